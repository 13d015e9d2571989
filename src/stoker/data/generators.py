"""The random generators that a dataset holds itself, such as `self.rng = np.random.default_rng(0)`.

Each process that reads samples has its own copy of them, and a resumed run has new ones: to make samples a
function of (seed, epoch, sample) again, they are seeded before each sample, as the global ones are.
"""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator

_KINDS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_MOST = 10_000  # objects that are looked at
_MOST_ITEMS = 100  # of a list, or a dict
_LEAVES = (str, bytes, int, float, complex, np.ndarray, torch.Tensor, types.ModuleType, type, type(None))


def of(dataset: object) -> list[Generator]:
    """The generators in the attributes of a dataset, and of what these hold: transforms, wrapped datasets."""
    found: list[Generator] = []
    seen: set[int] = set()
    waiting: list[object] = [dataset]
    while waiting and len(seen) < _MOST:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _LEAVES):
            continue
        seen.add(id(one))
        if isinstance(one, _KINDS):
            found.append(one)
        else:
            waiting.extend(_inside(one))
    return found


def _inside(one: object) -> Iterator[object]:
    if isinstance(one, Mapping):
        yield from itertools.islice(one.values(), _MOST_ITEMS)
    elif isinstance(one, list | tuple | set | frozenset):
        yield from itertools.islice(one, _MOST_ITEMS)
    elif isinstance(one, functools.partial):
        yield from (one.func, one.args, one.keywords)
    elif isinstance(one, types.MethodType):
        yield one.__self__
    elif isinstance(one, types.FunctionType):
        yield from (cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell))
    else:
        yield from getattr(one, "__dict__", {}).values()


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def seed(generator: Generator, key: int) -> None:
    """Seed a generator with a number of 64 bits."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(key).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(key % 2**32)
    elif isinstance(generator, random.Random):
        generator.seed(key)
    else:
        generator.manual_seed(key)


@contextmanager
def kept(generators: list[Generator]) -> Iterator[None]:
    """Restore their states afterwards."""
    puts = [_put_back(one) for one in generators]
    try:
        yield
    finally:
        for put in puts:
            put()


def _put_back(one: Generator) -> Callable[[], Any]:
    """What restores a generator's present state."""
    if isinstance(one, np.random.Generator):
        return functools.partial(setattr, one.bit_generator, "state", one.bit_generator.state)
    if isinstance(one, random.Random):
        return functools.partial(one.setstate, one.getstate())
    if isinstance(one, torch.Generator):
        return functools.partial(one.set_state, one.get_state())
    return functools.partial(one.set_state, one.get_state(legacy=True))


def _reduced(one: torch.Generator) -> tuple[Callable[..., torch.Generator], tuple[str, bytes]]:
    return _rebuilt, (str(one.device), one.get_state().numpy().tobytes())


def _rebuilt(device: str, state: bytes) -> torch.Generator:
    made = torch.Generator(device)
    made.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return made


ForkingPickler.register(
    torch.Generator, _reduced
)  # torch 2.13 sends an empty shared tensor, which cannot arrive
