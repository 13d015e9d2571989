"""The random generators that a dataset holds itself, such as `self.rng = np.random.default_rng(0)`.

Each process that reads samples has its own copy of them, and a resumed run has new ones: to make samples a
function of (seed, epoch, sample) again, they are seeded before each sample, as the global ones are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = np.random.Generator | np.random.RandomState | random.Random | torch.Generator
Salted: TypeAlias = tuple[Generator, int]
"""A generator, and a number of 64 bits that makes its seeds different from those of others."""

GLOBAL: list[Salted] = [
    (random._inst, 0),
    (np.random.mtrand._rand, 0),
    (torch.default_generator, 0),  # not every GPU's: those belong to the training step
]

_MOST = 2_000  # objects that are looked at
_MOST_ITEMS = 100  # of a list, or a dict
_FEW_ITEMS = 16  # all of so few are looked at: they may be settings, and a transform among them
_LEAVES = (str, bytes, int, float, complex, np.ndarray, torch.Tensor, types.ModuleType, type, type(None))
_BITS = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that numbers that differ do so in their lower 32 bits too


def of(holder: object) -> list[Salted]:
    """The generators in the attributes of a dataset, and of what these hold: transforms, wrapped datasets.

    The salt of each is a function of where it was found, which is the same in every process.
    """
    found: list[Salted] = []
    seen: dict[int, object] = {}
    waiting: deque[tuple[int, Any]] = deque([(0, holder)])
    while waiting and len(seen) < _MOST:
        place, one = waiting.popleft()  # the nearest first: what there is a lot of is data, and far inside
        if id(one) in seen or issubclass(type(one), _LEAVES):
            continue
        seen[id(one)] = one
        with contextlib.suppress(Exception):  # whatever it is, it ends no run
            if _is_generator(one):
                found.append((one, (place or 1) * _SPREAD % 2**64))
            else:
                waiting.extend((zlib.crc32(name.encode(), place), value) for name, value in _inside(one))
    return found


def _is_generator(one: Any) -> bool:
    """Whether an object is a generator that can be seeded; not one that reads the system's randomness."""
    kind = type(one)
    if kind in (np.random.Generator, np.random.RandomState):
        return type(one._bit_generator) in _BITS
    if issubclass(kind, random.Random):
        return kind.seed is random.Random.seed and kind.getstate is random.Random.getstate
    return kind is torch.Generator


def _inside(one: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with a name.

    Runs no code of its class, such as `__getattr__`, or `values` of a mapping, which can read files or raise.
    """
    kind = type(one)
    for number, value in enumerate(_unnamed(one)):
        yield str(number), value
    with contextlib.suppress(Exception):
        yield from list(object.__getattribute__(one, "__dict__").items())
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            for name, member in vars(base).items():
                if type(member) is types.MemberDescriptorType:
                    with contextlib.suppress(AttributeError):  # not set
                        yield name, member.__get__(one)


def _unnamed(one: Any) -> Iterable[Any]:
    kind = type(one)
    if issubclass(kind, dict | list | tuple):
        items = _first(one, _MOST_ITEMS)
        return () if len(items) > _FEW_ITEMS and _is_plain(one) else items
    if issubclass(kind, functools.partial):
        return one.func, one.args, one.keywords
    if kind in (types.MethodType, types.BuiltinMethodType):
        return (one.__self__,)
    if kind is types.FunctionType:
        return [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
    return ()


def _first(items: Any, count: int) -> list[Any]:
    """The first values of a dict, list or tuple, also of a subclass."""
    kind = type(items)
    if issubclass(kind, dict):
        return list(itertools.islice(dict.values(items), count))
    iterate = list.__iter__ if issubclass(kind, list) else tuple.__iter__
    return list(itertools.islice(iterate(items), count))


def _is_plain(one: Any, depth: int = 4) -> bool:
    """Whether it is data, such as numbers, text, and lists and dicts of these, by its first items."""
    kind = type(one)
    if issubclass(kind, dict | list | tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in _first(one, 3))
    return issubclass(kind, _LEAVES)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def seed(salted: Iterable[Salted], key: int) -> None:
    """Seed each generator with a number of 64 bits, and its own salt."""
    for generator, salt in salted:
        own = key ^ salt
        if isinstance(generator, random.Random):
            generator.seed(own)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        else:
            _seed_numpy(generator, own)


def _seed_numpy(generator: np.random.Generator | np.random.RandomState, key: int) -> None:
    bits: Any = generator._bit_generator  # type: ignore[union-attr]
    if isinstance(generator, np.random.RandomState) and isinstance(bits, np.random.MT19937):
        generator.seed(key % 2**32)  # as np.random.seed does
    else:
        bits.state = type(bits)(key).state


@contextmanager
def kept(salted: Iterable[Salted]) -> Iterator[None]:
    """Restore the generators' states afterwards."""
    puts = [_put_back(generator) for generator, _ in salted]
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
    return functools.partial(one.set_state, one.get_state(legacy=False))


def _reduced(one: torch.Generator) -> tuple[Callable[..., torch.Generator], tuple[str, bytes]]:
    return _rebuilt, (str(one.device), one.get_state().numpy().tobytes())


def _rebuilt(device: str, state: bytes) -> torch.Generator:
    made = torch.Generator(device)
    made.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return made


# torch 2.13 sends a generator's state to a worker as an empty shared tensor, which cannot arrive.
ForkingPickler.register(torch.Generator, _reduced)
