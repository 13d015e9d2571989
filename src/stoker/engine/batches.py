"""Batches of any structure: mappings, tuples, named tuples and dataclasses of tensors and other values.

The first dim of every tensor counts samples; a tensor without dims belongs to all samples. So does anything
that is not a tensor, except lists and arrays with one item per sample, such as the file names.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from stoker.errors import BadInput
from stoker.words import some
from torch.utils import _pytree as pytree

_MOST_SHAPES = 4  # shapes listed in a message


def map_tensors(
    function: Callable[[torch.Tensor], Any], batch: Any, rows: Callable[[Any], Any] | None = None
) -> Any:
    """A copy of the batch in which the function's result replaces each tensor.

    Args:
        rows: called with every value that is neither a tensor nor a container of tensors; returns its
            replacement, or None.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {
            f.name: map_tensors(function, getattr(batch, f.name), rows) for f in dataclasses.fields(batch)
        }
        return dataclasses.replace(batch, **fields)

    def other(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return function(node)
        if isinstance(node, Mapping):  # one that torch's trees do not know, such as BatchEncoding
            return _with(node, {key: map_tensors(function, value, rows) for key, value in node.items()})
        cut = None if rows is None else rows(node)
        return node if cut is None else cut

    return pytree.tree_map(
        other, batch, is_leaf=None if rows is None else lambda node: rows(node) is not None
    )


def _with(given: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """A copy of a dict of a kind of its own with other values; of any other mapping, a dict."""
    if not isinstance(given, dict | UserDict):
        return values
    made = copy.copy(given)
    made.update(values)
    return made


def for_each_tensor(function: Callable[[torch.Tensor], Any], batch: Any) -> None:
    """Call a function with every tensor of a batch, in order."""
    map_tensors(lambda tensor: (function(tensor), tensor)[1], batch)


def shapes(batch: Any) -> list[str]:
    """The shape and dtype of every tensor, as text."""
    found: list[str] = []
    for_each_tensor(lambda tensor: found.append(f"{tuple(tensor.shape)} {tensor.dtype}"), batch)
    return found


def to_device(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Move every tensor of a batch to a device; images (4 dims) to channels last, if requested."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device, non_blocking=True)
        return (
            moved.contiguous(memory_format=torch.channels_last)
            if channels_last and moved.dim() == 4
            else moved
        )

    return map_tensors(move, batch)


def size(batch: Any, share: int | None = None) -> int:
    """The number of samples: the first dim of the tensors, ignoring tensors without dims.

    Args:
        share: how many samples the loader put into the batch, if known: used for a batch whose tensors do
            not have the sample dim first.

    Raises:
        ValueError: no tensor has a dim, and the share is not known.
    """
    tensors = _with_dims(batch)
    if share is not None and not can_be_cut(batch, share):
        return share
    if not tensors:
        raise ValueError(
            f"a batch of type {type(batch).__name__} contains no tensor, so its samples cannot be counted"
        )
    return tensors[0].size(0)


def can_be_cut(batch: Any, share: int | None) -> bool:
    """Whether the tensors of a batch have the sample dim first, see `size`."""
    return _has_samples_first(_with_dims(batch), share) and not _lists(batch, share)


def split(batch: Any, micro_batch: int | None, share: int | None = None) -> Iterator[Any]:
    """The batch in parts of at most `micro_batch` samples (None: whole).

    Args:
        share: see `size`.

    Raises:
        BadInput: the batch must be split, but does not have the sample dim first.
    """
    if micro_batch is None or (samples := size(batch, share)) <= micro_batch:
        yield batch
        return
    if not can_be_cut(batch, share):
        raise BadInput(_cannot_be_cut(batch, micro_batch, samples, share))
    for start in range(0, samples, micro_batch):
        yield _part(batch, slice(start, start + micro_batch), samples)


def _part(batch: Any, part: slice, samples: int) -> Any:
    def rows(node: Any) -> Any:
        return node[part] if _is_of_rows(node, samples) else None

    return map_tensors(lambda tensor: tensor[part] if tensor.dim() else tensor, batch, rows)


def _is_of_rows(node: Any, samples: int) -> bool:
    """Whether a value has one item per sample, none of which is, or contains, a tensor."""
    if isinstance(node, np.ndarray):
        return node.ndim > 0 and len(node) == samples
    if type(node) not in (list, tuple) or len(node) != samples:  # a named tuple has fields
        return False
    return not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node))


def _lists(batch: Any, share: int | None) -> list[Any]:
    """The lists of the batch that may have one item per sample, each of tensors, instead of one per field.

    Those of the fields of a batch are of tensors that all have the sample dim first.
    """
    found: list[Any] = []

    def look(node: Any) -> None:
        if type(node) not in (list, tuple) or len(node) != share:
            return
        tensors = _with_dims(node)
        of_mappings = node is not batch and all(isinstance(item, Mapping) for item in node)
        if tensors and (of_mappings or any(tensor.size(0) != share for tensor in tensors)):
            found.append(node)

    map_tensors(lambda tensor: tensor, batch, look)
    return found


def _with_dims(batch: Any) -> list[torch.Tensor]:
    """The tensors that have a dim, in order."""
    found: list[torch.Tensor] = []
    for_each_tensor(lambda tensor: found.append(tensor) if tensor.dim() else None, batch)
    return found


def _has_samples_first(tensors: Sequence[torch.Tensor], share: int | None) -> bool:
    """Whether the first dims are equal, and not all of them some other dim before the sample dim.

    A first dim that differs from the share is still the sample dim if a collate function joins or multiplies
    samples. It is not if all tensors have the share as their second dim, or if it is larger than the share
    and no multiple: samples of several rows each, such as the nodes of graphs.
    """
    if len({tensor.size(0) for tensor in tensors}) != 1:
        return False
    first = tensors[0].size(0)
    if share is None or first == share:
        return True
    if first > share and first % share:
        return False
    return not all(tensor.dim() > 1 and tensor.size(1) == share for tensor in tensors)


def _cannot_be_cut(batch: Any, micro_batch: int, samples: int, share: int | None) -> str:
    lists = f", in lists of {samples}" if _lists(batch, share) else ""
    said = [str(tuple(tensor.shape)) for tensor in _with_dims(batch)]
    shapes = f"tensors of shape {some(said, _MOST_SHAPES)}{lists}" if said else "no tensors"
    whole = f", or set it to at least {samples}" if share is not None else ""
    return (
        f"micro_batch={micro_batch}: a batch is split along the first dim of its tensors, which must be the "
        f"sample dim in all of them, but this batch has {shapes}: make collate put samples first "
        f"(batch_first=True), or omit micro_batch{whole}"
    )


def default_inputs(batch: Any) -> dict[str, Any] | tuple[Any, ...]:
    """The model's arguments if the user does not specify them: a dict's items, or a tuple's first."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple | list):
        return (batch[0],)
    return (batch,)
