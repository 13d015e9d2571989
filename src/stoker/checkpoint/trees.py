"""Stores what a `state_dict()` returns: values as JSON, and tensors separately, by their place in it.

JSON's numbers, strings and lists represent themselves; anything else is an object with one key, which names
the type: `{"tuple": [1, 2]}`. So the reassembled state has the same types and is bit-identical.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orjson
import torch
from stoker import words
from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]

ALLOWED = (
    "tensors, NumPy arrays, numbers, strings, True, False, None, and lists, tuples, deques, sets, dicts and "
    "Counters of these"
)

_SCALARS = (type(None), bool, str, int, float)
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_MAPPINGS: dict[type, str] = {
    dict: "dict", collections.OrderedDict: "OrderedDict", collections.Counter: "Counter",
}  # fmt: skip
_KEYS = (*_SCALARS, tuple)
_INTEGERS = range(-(2**63), 2**64)  # integers that JSON is written and read with exactly
_UNKNOWN = (torch.complex128, torch.complex32)  # to safetensors


class Unsavable(Exception):
    """A part of a state that a checkpoint cannot hold, and its place."""


def apart(tree: Any) -> tuple[Any, Tensors]:
    """A state as JSON values, and its tensors by place (`['shadow'][0]`), sharing their memory.

    Raises Unsavable.
    """
    tensors: Tensors = {}
    return _apart(tree, "", tensors), tensors


def together(values: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Reassemble the state that `apart` split."""
    if isinstance(values, list):
        return [together(value, tensors) for value in values]
    if not isinstance(values, dict):
        return values
    ((kind, held),) = values.items()
    return _READ[kind](held, tensors)


def _read_mapping(kind: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def read(held: Any, tensors: Any) -> Any:
        if isinstance(held, dict):  # its keys are strings
            return kind({key: together(value, tensors) for key, value in held.items()})
        return kind({together(key, tensors): together(value, tensors) for key, value in held})

    return read


def _read_sequence(kind: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda held, tensors: kind(together(held, tensors))


_READ: dict[str, Callable[[Any, Any], Any]] = {
    "tensor": lambda held, tensors: tensors[held["at"]],
    "array": lambda held, tensors: tensors[held["at"]].numpy(),
    "numpy": lambda held, tensors: np.dtype(held[0]).type(together(held[1], tensors)),
    "deque": lambda held, tensors: collections.deque(together(held[1], tensors), held[0]),
    "int": lambda held, tensors: int(held),
    "float": lambda held, tensors: float(held),
    **{name: _read_sequence(kind) for kind, name in _SEQUENCES.items()},
    **{name: _read_mapping(kind) for kind, name in _MAPPINGS.items()},
}


def leaves(values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The description of each tensor in JSON values.

    It has its place `at`, its `dtype` and `shape`, the device it was `on`, and whether it is a `tensor` or
    a NumPy `array`.
    """
    if isinstance(values, dict):
        for kind, held in values.items():
            if kind in ("tensor", "array") and isinstance(held, dict) and "at" in held:
                yield kind, held
            else:
                yield from leaves(held)
    elif isinstance(values, list):
        for value in values:
            yield from leaves(value)


def _apart(value: Any, at: str, tensors: Tensors) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return _scalar(value)
    if kind in _MAPPINGS:
        return {_MAPPINGS[kind]: _items(value, at, tensors)}
    if kind in (list, collections.deque, *_SEQUENCES):
        return _sequence(value, at, tensors)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {"numpy": [value.dtype.str, _scalar(value.item())]}
    tensors[at] = found = _tensor(value, at)
    about = {"at": at, "dtype": str(found.dtype).removeprefix("torch."), "shape": list(found.shape)}
    if isinstance(value, np.ndarray):
        return {"array": about}
    return {"tensor": {**about, "on": found.device.type}}


def _scalar(value: Any) -> Any:
    if type(value) is int and value not in _INTEGERS:
        return {"int": str(value)}
    if type(value) is float and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _sequence(values: Any, at: str, tensors: Tensors) -> Any:
    held = [_apart(value, f"{at}[{number}]", tensors) for number, value in enumerate(values)]
    if type(values) is list:
        return held
    if isinstance(values, collections.deque):
        return {"deque": [values.maxlen, held]}
    if not isinstance(values, tuple):  # a set's order is arbitrary, and differs between ranks
        held.sort(key=orjson.dumps)
    return {_SEQUENCES[type(values)]: held}


def _items(mapping: Mapping[Any, Any], at: str, tensors: Tensors) -> Any:
    for key in mapping:
        if type(key) not in _KEYS and not isinstance(key, np.generic):
            raise Unsavable(f"a key of type {type(key).__name__}{_where(at)}")
    held = {key: _apart(value, f"{at}[{key!r}]", tensors) for key, value in mapping.items()}
    if all(type(key) is str for key in held):
        return held
    return [[_apart(key, at, tensors), value] for key, value in held.items()]


def _tensor(value: Any, at: str) -> torch.Tensor:
    """The data to save for a tensor or an array. Raises Unsavable."""
    if type(value) is np.ndarray:
        found = _of_array(value, at)
    elif type(value) in (torch.Tensor, torch.nn.Parameter):
        found = value.detach()
    elif isinstance(value, DTensor):
        raise Unsavable(
            f"a tensor that is sharded over ranks{_where(at)} (pass an optimizer of the model's parameters "
            "to Trainer(optimizer=...); for an average of them set ema.decay=0.999)"
        )
    else:
        raise Unsavable(f"{words.named(value)}{_where(at)}")
    if found.layout != torch.strided or found.is_quantized or found.is_meta or found.dtype in _UNKNOWN:
        what = "meta" if found.is_meta else f"{found.layout}, {found.dtype}"
        raise Unsavable(f"a tensor ({what}){_where(at)}")
    return found


def _of_array(array: np.ndarray[Any, Any], at: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):
        raise Unsavable(f"an array of {array.dtype}{_where(at)}") from None


def _where(at: str) -> str:
    return f" at {at}" if at else ""
