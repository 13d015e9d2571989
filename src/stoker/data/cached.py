"""What one of the processes that want it makes in the cache, for all of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stoker import storage
from stoker.errors import BadInput

T = TypeVar("T")

_LOCK_TIMEOUT = 24 * 3600.0  # seconds to wait for another process that is making the same


def name(*parts: object) -> str:
    """The name in the cache of what is made from these; another for parts that differ in their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def opened(
    target: Path, fill: Callable[[Path], None], opening: Callable[[Path], T], lock: Path | None = None
) -> T:
    """What `opening` returns of a folder that `once` made.

    A folder that lacks files, as where old ones are removed from a cache by their age, is made again.
    """
    lock, was_removed = lock or _lock_of(target), False
    while True:
        made = once(target, fill, lock)
        try:
            return opening(made)
        except FileNotFoundError:
            with storage.locked(lock, _LOCK_TIMEOUT):
                if not (target.exists() and _lacks_files(target, opening)):
                    continue  # another process has removed it, or has made it again
                if was_removed:
                    raise
                shutil.rmtree(target)
                was_removed = True


def _lacks_files(target: Path, opening: Callable[[Path], object]) -> bool:
    try:
        opening(target)
    except FileNotFoundError:
        return True
    return False


def once(target: Path, fill: Callable[[Path], None], lock: Path | None = None) -> Path:
    """A folder or a file in the cache, made by exactly one of the processes that ask.

    Args:
        fill: makes it under the temporary path that it is given, see `storage.new`.
        lock: a file, locked while it is made; default: one next to it.

    Raises:
        BadInput: the cache is not writable.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(lock or _lock_of(target), _LOCK_TIMEOUT):
            if not target.exists():
                with storage.new(target) as temporary:
                    fill(temporary)
    except OSError as error:
        raise BadInput(
            f"the cache {target.parent} is not writable ({error.strerror}): "
            "set STOKER_CACHE to a different folder"
        ) from error
    return target


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")
