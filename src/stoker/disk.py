"""What is to be on the disk within a second: who makes many small files does not wait for each.

A power cut may take what was written last; the death of the process takes nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from stoker import storage
from stoker.periodic import Job, Periodic

log = logging.getLogger("stoker")

_SECONDS = 1.0


class _Bringer:
    """What waits to be brought, and the thread that brings it, which is there once there was something."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._waiting: dict[Path, None] = {}  # a set that keeps what came while it is emptied
        self._one = threading.Lock()  # brings at a time
        self._failed: OSError | None = None
        """The first failure of which nobody who waited has heard."""
        self._periodic: Periodic | None = None

    def bring_soon(self, paths: tuple[Path, ...]) -> None:
        self._waiting.update(dict.fromkeys(paths))
        if self._periodic is None:
            self._periodic = Periodic([Job(_SECONDS, self._bring_all)], "stoker-disk")

    def bring(self) -> None:
        self._bring_all()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _bring_all(self) -> None:
        with self._one:
            while self._waiting:
                path, _ = self._waiting.popitem()
                try:
                    (storage.sync_directory if path.is_dir() else storage.sync_file)(path)
                except FileNotFoundError:  # it was removed meanwhile
                    continue
                except OSError as error:  # kept: to whoever asks again the kernel says that all is well
                    self._failed = self._failed or error
                    log.warning("%s is not on the disk: %s", path, error)


_BRINGER = _Bringer()
os.register_at_fork(after_in_child=_BRINGER.forget)  # what waits is brought by the parent


def bring_soon(*paths: Path) -> None:
    """Have files, and the names in folders, brought to the disk by a thread."""
    _BRINGER.bring_soon(paths)


def bring() -> None:
    """Bring all that waits to the disk; done when this returns.

    Raises OSError where something was not brought there since the last call, by the thread either.
    """
    _BRINGER.bring()
