"""A tensor by what a rank holds of it, and by its real numbers."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as real numbers: of one that is complex the two parts, in a dim of their own."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
