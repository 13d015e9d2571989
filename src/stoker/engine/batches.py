"""Batches of any shape: dicts, tuples, named tuples and dataclasses of tensors.

The first dim of every tensor counts samples.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


def _map(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: _map(function, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    return pytree.tree_map_only(torch.Tensor, function, batch)


def for_each_tensor(function: Callable[[torch.Tensor], Any], batch: Any) -> None:
    """Call a function with every tensor of a batch, in order."""
    _map(lambda tensor: (function(tensor), tensor)[1], batch)


def shapes(batch: Any) -> list[str]:
    """The shape and dtype of every tensor, in words."""
    found: list[str] = []
    for_each_tensor(lambda tensor: found.append(f"{tuple(tensor.shape)} {tensor.dtype}"), batch)
    return found


def to_device(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """The batch with every tensor on the device; images (4 dims) channels last in memory, if asked to."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device, non_blocking=True)
        return (
            moved.contiguous(memory_format=torch.channels_last)
            if channels_last and moved.dim() == 4
            else moved
        )

    return _map(move, batch)


def size(batch: Any) -> int:
    """The number of samples: the first dim of its first tensor. Raises ValueError where it has none."""
    sizes: list[int] = []
    _map(lambda tensor: sizes.append(len(tensor)), batch)
    if not sizes:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor: its samples cannot be counted"
        )
    return sizes[0]


def split(batch: Any, micro_batch: int | None) -> Iterator[Any]:
    """The batch in parts of at most `micro_batch` samples (None: whole)."""
    if micro_batch is None:
        yield batch
        return
    for start in range(0, size(batch), micro_batch):
        part = slice(start, start + micro_batch)
        yield _map(operator.itemgetter(part), batch)


def default_inputs(batch: Any) -> dict[str, Any] | tuple[Any, ...]:
    """What a model is called with where the user does not say: a dict's items, or a tuple's first."""
    if isinstance(batch, dict):
        return batch
    if isinstance(batch, tuple | list):
        return (batch[0],)
    return (batch,)
