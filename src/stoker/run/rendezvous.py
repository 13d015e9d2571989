"""How the ranks of one launch find the attempt that rank 0 begins, by the run's directory alone.

Rank 0 writes who it is into the lock that it holds, and the same into the first line of its
journal. A rank that finds both alike, under a lock that is held, has found its attempt, and
not one that ended before or another launch's. So rank 0 does not end before the others are there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import orjson
from stoker.errors import StokerError
from stoker.run import journal
from stoker.run.directory import RunDirectory

TIMEOUT = 600.0  # seconds; loading code and data on rank 0 comes first
_LATE = 5.0  # seconds that rank 0 gives those that are not there when it has ended; some may never come
_INTERVAL = 0.05


@dataclass(frozen=True)
class Opening:
    """One opening of a run: an id of its own, and which launch did it."""

    id: str
    launch: str


def wait(run: RunDirectory, launch: str, rank: int, timeout: float = TIMEOUT) -> tuple[int, dict[str, Any]]:
    """The attempt that rank 0 of this launch began, and its first event. Raises StokerError.

    One that this rank took part in already is over for it, whatever rank 0 does still: the next one is meant.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = _begun(run, launch)
        if found is not None and not journal.has_joined(run.journal, found[0], rank):
            return found
        time.sleep(_INTERVAL)
    raise StokerError(f"rank 0 of this launch did not open {run.path} within {timeout:.0f} s")


def wait_for_others(run: RunDirectory, attempt: int, size: int, timeout: float = _LATE) -> None:
    """Wait until all ranks take part in an attempt: none would find one that is over."""
    deadline = time.monotonic() + timeout
    while journal.ranks(run.journal, attempt) < size and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def _begun(run: RunDirectory, launch: str) -> tuple[int, dict[str, Any]] | None:
    try:
        opening = Opening(**orjson.loads(run.lock_file.read_bytes()))
    except (OSError, orjson.JSONDecodeError, TypeError):
        return None
    if opening.launch != launch or not run.alive:
        return None
    newest = journal.newest_attempt(run.journal)
    if newest is not None and newest[1].get("opening") == opening.id:
        return newest
    return None
