"""What one of the processes that want it makes in the cache, for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from stoker import storage
from stoker.errors import BadInput

_LOCK_TIMEOUT = 24 * 3600.0  # seconds to wait for another process that is making the same


def name(*parts: object) -> str:
    """The name in the cache of what is made from these; another for parts that differ in their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


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
        with storage.locked(lock or target.with_name(f"{target.name}.lock"), _LOCK_TIMEOUT):
            if not target.exists():
                with storage.new(target) as temporary:
                    fill(temporary)
    except OSError as error:
        raise BadInput(
            f"the cache {target.parent} is not writable ({error.strerror}): "
            "set STOKER_CACHE to a different folder"
        ) from error
    return target
