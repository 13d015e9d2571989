"""Which samples a dataset is made of, and what it is set to, as far as datasets say that themselves.

A subset that is drawn can be another one on each rank, or in a resumed run, and what a loop sets on its
dataset reaches no worker, which has a copy. Neither can be seen in the batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

_PLAIN = (bool, int, float, str, type(None))
_DEPTH = 3  # of objects within objects that are looked at: wrapped datasets, and their transforms


def fingerprint(dataset: Any, lengths: NDArray[Any] | None = None) -> str:
    """Of the length of a dataset, and the indices of the subsets that it consists of, also of `datasets`.

    Args:
        lengths: of its samples, by which they are ordered.
    """
    found = xxhash.xxh3_64(str(len(dataset)).encode())
    _add(found, dataset)
    if lengths is not None:
        found.update(lengths.tobytes())
    return found.hexdigest()


def _add(found: xxhash.xxh3_64, dataset: Any) -> None:
    if isinstance(dataset, Subset):
        found.update(b"subset" + _bytes(dataset.indices))
        _add(found, dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        parts: list[Any] = dataset.datasets
        for part in parts:
            found.update(b"part" + str(len(part)).encode())
            _add(found, part)
    elif (kept := _attributes(dataset).get("_indices")) is not None and hasattr(kept, "column"):
        found.update(_bytes(kept.column(0)))  # a table, of `datasets`


def _bytes(indices: Any) -> bytes:
    if isinstance(indices, torch.Tensor):
        indices = indices.numpy(force=True)
    held = np.asarray(indices)
    return held.astype(np.int64).tobytes() if held.dtype.kind in "iu" else repr(indices).encode()


def settings(dataset: object) -> dict[str, Any]:
    """The public attributes of a dataset that are numbers or texts, and those of what it holds, by path."""
    found: dict[str, Any] = {}
    _look(found, "", dataset, _DEPTH)
    return found


def _look(found: dict[str, Any], path: str, one: object, depth: int) -> None:
    for name, value in _attributes(one).items():
        if name.startswith("_"):  # what it keeps to itself can change by itself
            continue
        if issubclass(type(value), _PLAIN):
            found[f"{path}{name}"] = value
        elif depth and not issubclass(type(value), torch.Tensor | np.ndarray | type):
            _look(found, f"{path}{name}.", value, depth - 1)


def _attributes(one: object) -> dict[str, Any]:
    """What an object holds, read without its own code, which could open a file or fail."""
    try:
        found: dict[str, Any] = object.__getattribute__(one, "__dict__")
    except AttributeError:
        return {}
    return found
