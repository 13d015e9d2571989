"""What is to be on the disk within a second: who makes many small files does not wait for each.

A power cut may take what was written last; the death of the process takes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from pathlib import Path

from stoker import storage
from stoker.periodic import Job, Periodic

_SECONDS = 1.0
_waiting: collections.deque[Path] = collections.deque()
_one = threading.Lock()  # brings at a time
_brings: list[Periodic] = []


def bring_soon(*paths: Path) -> None:
    """Have files, and the names in folders, brought to the disk by a thread."""
    _waiting.extend(paths)
    if not _brings:
        _brings.append(Periodic([Job(_SECONDS, bring)], "stoker-disk"))


def bring() -> None:
    """Bring all that waits to the disk; done when this returns. Raises OSError."""
    with _one:
        while _waiting:
            path = _waiting.popleft()
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                (storage.sync_directory if path.is_dir() else storage.sync_file)(path)
