"""Views of tensors: a rank's local part, and complex numbers as real ones; and what has such views."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as real numbers; of complex ones the two parts, in an additional dimension."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are numbers at strides: not sparse, nested or quantised."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
