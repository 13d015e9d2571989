"""Syncs files to the disk in the background, within about a second, so that writing many small files is fast.

A power cut may lose what was written last; the death of the process loses nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from stoker import storage
from stoker.periodic import Periodic, Task

log = logging.getLogger("stoker")

_SECONDS = 1.0


class _Bringer:
    """The files that wait to be synced, and the thread that syncs them, started with the first file."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._waiting: dict[Path, None] = {}  # an ordered set; may grow while it is emptied
        self._one = threading.Lock()  # held while syncing
        self._failed: OSError | None = None
        """The first failure that `bring` has not raised yet."""
        self._periodic: Periodic | None = None

    def bring_soon(self, paths: tuple[Path, ...]) -> None:
        self._waiting.update(dict.fromkeys(paths))
        if self._periodic is None:
            self._periodic = Periodic([Task(_SECONDS, self._bring_all)], "stoker-disk")

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
                except FileNotFoundError:  # removed in the meantime
                    continue
                except OSError as error:  # kept, because the kernel reports such an error only once
                    self._failed = self._failed or error
                    log.warning("%s could not be synced to the disk: %s", path, error)


_BRINGER = _Bringer()
os.register_at_fork(after_in_child=_BRINGER.forget)  # the parent syncs its files


def bring_soon(*paths: Path) -> None:
    """Sync files, and the names in folders, to the disk in a background thread."""
    _BRINGER.bring_soon(paths)


def bring() -> None:
    """Sync all waiting files to the disk before returning.

    Raises OSError if syncing any file has failed since the last call, here or in the thread.
    """
    _BRINGER.bring()
