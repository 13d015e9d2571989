"""Records every allocation and release in a stretch of code, and their peak.

Storages are tracked, not tensors: a view takes no memory, and neither does anything on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from stoker.engine import memory
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Key = int
"""Identifies a storage. Keys are never reused."""


@dataclass(frozen=True)
class Peak:
    """The moment at which the most memory was held."""

    total: int
    """In bytes."""
    held: Mapping[Key, int]
    """Bytes by storage."""
    moment: str
    """What was happening, as reported to `Allocations`."""


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this mode, the results of every operation are tracked until they are released.

    Args:
        moment: returns what is happening at the moment.
    """

    def __init__(self, moment: Callable[[], str] = lambda: "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._moment = moment
        self._known: dict[int, tuple[Key, weakref.ref[torch.UntypedStorage]]] = {}  # by address
        self._bytes: dict[Key, int] = {}
        self._begun: dict[Key, int] = {}  # what was held when tracking began
        self._changes: list[tuple[Key, int, str]] = []  # a storage, its new number of bytes, the moment
        self.resized: set[Key] = set()
        """Storages whose size was changed, such as those into which FSDP gathers."""

    def begin(self) -> None:
        """Start the stretch that `peak` reports on."""
        self._begun, self._changes = dict(self._bytes), []

    def peak(self, but: Set[Key] = frozenset()) -> Peak:
        """The peak since `begin`.

        Args:
            but: storages that do not count.
        """
        held = {key: size for key, size in self._begun.items() if key not in but}
        now = most = sum(held.values())
        at, moment, known = 0, self._moment(), dict(held)
        for number, (key, size, when) in enumerate(self._changes, start=1):
            if key in but:
                continue
            now += size - known.get(key, 0)
            known[key] = size
            if now > most:
                most, at, moment = now, number, when
        for key, size, _ in self._changes[:at]:
            if key not in but:
                held[key] = size
        return Peak(most, {key: size for key, size in held.items() if size}, moment)

    def follow(self, tensors: Iterable[torch.Tensor]) -> set[Key]:
        """Track the storages of tensors (of sharded ones, this rank's shards) from now on; returns them."""
        return {self._see(storage) for tensor in tensors for storage in _storages(tensor)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # operations on its shards are dispatched here separately
        result = self.call(function, args, kwargs or {})
        self.follow(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation."""
        return function(*args, **kwargs)

    def __enter__(self) -> Allocations:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self._known:  # a resize is not an operation
                self.resized.add(self._see(storage))
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _see(self, storage: torch.UntypedStorage) -> Key:
        address = storage._cdata
        if address not in self._known:
            key = len(self._bytes)
            self._bytes[key] = 0
            self._known[address] = key, weakref.ref(storage, lambda _: self._gone(address))
        key, _ = self._known[address]
        self._change(key, storage.nbytes())
        return key

    def _gone(self, address: int) -> None:
        key, _ = self._known.pop(address)
        self._change(key, 0)

    def _change(self, key: Key, size: int) -> None:
        if size != self._bytes[key]:
            self._bytes[key] = size
            self._changes.append((key, size, self._moment()))


def _storages(tensor: torch.Tensor) -> Iterable[torch.UntypedStorage]:
    """The storages that hold memory: of a sharded tensor its shard's, of a wrapper those of its contents."""
    for held in memory.plain([tensor]):
        device = held.fake_device if isinstance(held, FakeTensor) else held.device  # which is an operation
        if device.type != "meta" and held.layout is torch.strided:
            yield held.untyped_storage()
