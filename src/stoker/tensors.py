"""Sharded tensors and a rank's part of them; complex numbers as real ones; which are plain, sparse, saved."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; all ranks ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(
    old: torch.Tensor, local: torch.Tensor, shape: torch.Size | tuple[int, ...] | None = None
) -> torch.Tensor:
    """This rank's part of a new tensor as the tensor, laid out over the ranks as an old one is.

    Args:
        shape: of the whole new tensor, if it is not that of the old one.
    """
    if not isinstance(old, DTensor):
        return local
    stride = old.stride() if shape is None else torch.empty(shape, device="meta").stride()
    shape = old.shape if shape is None else torch.Size(shape)
    made = DTensor.from_local(
        local, old.device_mesh, old.placements, run_check=False, shape=shape, stride=stride
    )
    return made.to(local.device)  # an offloaded one: from_local takes it to the mesh's device


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as real numbers; of complex ones the two parts, in an additional dimension."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are numbers at strides: not sparse, nested or quantised."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)


def is_sparse(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds only its elements that are not zero, in whichever layout."""
    return tensor.layout in _SPARSE


def saved_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers in a model's state, including those that are None."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
