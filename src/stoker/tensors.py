"""Views of tensors: a rank's local part, and complex numbers as real ones."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as real numbers; of complex ones the two parts, in an additional dimension."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
