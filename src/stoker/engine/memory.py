"""How much memory a rank holds, by what it is for, and its peak."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once; of sharded ones the shards of this rank."""
    sizes: dict[int, int] = {}
    for local in _plain(tensors):
        try:
            storage = local.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor that is only a wrapper, or a fake one
            continue
        if storage.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _plain(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The shards of this rank, and what a wrapper of several tensors holds, as torchao's 8-bit states are."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            yield from _plain([tensor.to_local()])
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain(getattr(tensor, name) for name in names)
        else:
            yield tensor


def peak(device: torch.device) -> int:
    """The most bytes that this process had at once: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
