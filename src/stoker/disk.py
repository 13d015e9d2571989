"""What is to be on the disk within a second: who makes many small files does not wait for each.

A power cut may take what was written last; the death of the process takes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from pathlib import Path

from stoker import storage
from stoker.periodic import Job, Periodic

_SECONDS = 1.0


class _Bringer:
    """What waits to be brought, and the thread that brings it, which is there once there was something."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._waiting: collections.deque[Path] = collections.deque()
        self._one = threading.Lock()  # brings at a time
        self._periodic: Periodic | None = None

    def bring_soon(self, paths: tuple[Path, ...]) -> None:
        self._waiting.extend(paths)
        if self._periodic is None:
            self._periodic = Periodic([Job(_SECONDS, self.bring)], "stoker-disk")

    def bring(self) -> None:
        with self._one:
            while self._waiting:
                path = self._waiting.popleft()
                with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                    (storage.sync_directory if path.is_dir() else storage.sync_file)(path)


_BRINGER = _Bringer()
os.register_at_fork(after_in_child=_BRINGER.forget)  # what waits is brought by the parent


def bring_soon(*paths: Path) -> None:
    """Have files, and the names in folders, brought to the disk by a thread."""
    _BRINGER.bring_soon(paths)


def bring() -> None:
    """Bring all that waits to the disk; done when this returns. Raises OSError."""
    _BRINGER.bring()
