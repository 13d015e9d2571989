"""The peak speed of a device, for model FLOPs utilisation (MFU), and the operations of a forward pass.

MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the number of floating-point operations that
the model's mathematics needs, divided by what the device could have done in that time. Operations repeated
to save memory do not count.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from stoker.engine import device as devices
from stoker.engine import modes
from stoker.engine.precision import DTYPES, Resolved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Peak:
    """Floating-point operations per second, and where the figure comes from."""

    flops: float
    source: str


# In 10**12 per second, dense, from the vendors' data sheets: bf16 and fp16 on tensor cores, fp32 on plain
# ones.
# The first entry whose name is among the words of the device's name counts.
_SHEETS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500, 80),
    ("B200", 2250, 75),
    ("GH200", 989, 67),
    ("H200", 989, 67),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989, 67),
    ("H800", 989, 67),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("A10G", 70, 35),
    ("A10", 125, 31.2),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX 4090", 165, 82.6),
    ("RTX 3090", 71, 35.6),
)


@functools.cache
def peak(device: torch.device, precision: Resolved) -> Peak:
    """The peak of a device in a precision: from its data sheet, or measured with matrix products."""
    name = devices.name(device)
    if device.type == "cuda":
        found = of_sheet(name, precision)
        if found is not None:
            return found
    return Peak(_measured(device, DTYPES[precision]), f"measured on {name} with matrix products")


def of_sheet(name: str, precision: Resolved) -> Peak | None:
    """The peak of a GPU by its name, from its data sheet; None if unknown."""
    for known, half, single in _SHEETS:
        if re.search(rf"\b{known}\b", name):
            return Peak((single if precision == "fp32" else half) * 1e12, f"data sheet of {known}")
    return None


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest rate of matrix products; larger ones are tried as long as they are quick."""
    best = 0.0
    for size in (128, 256, 512, 1024, 4096):
        left = right = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds(left, right) for _ in range(10 if size < 1024 else 3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.01:
            break
    return best


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    if not left.is_cuda:
        begun = time.thread_time()  # excludes what other processes take of this core
        left @ right
        return time.thread_time() - begun
    torch.cuda.synchronize(left.device)
    begun = time.perf_counter()
    left @ right
    torch.cuda.synchronize(left.device)
    return time.perf_counter() - begun


@torch.no_grad()
def of_forward(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Operations of one forward pass, from torch's counter, which covers products and convolutions.

    A multiplication and an addition count as 2.

    Args:
        model: is not changed; on the meta device, with inputs there, nothing is computed.
        inputs: its arguments.
    """
    with modes.evaluating(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())
