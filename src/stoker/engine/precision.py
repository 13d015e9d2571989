"""The precision a forward pass computes in; weights stay in float32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means here: bf16 on a GPU that has it, fp32 elsewhere (CPUs are slow at bf16)."""
    import torch

    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def autocast(
    precision: Literal["fp32", "bf16"], device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
