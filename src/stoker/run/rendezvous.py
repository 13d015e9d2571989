"""How the ranks of one launch find the attempt that rank 0 starts, using only the run's directory.

Rank 0 writes its launch and the id of its opening into the lock file that it holds, and the id into the first
line of its journal. If these match and the lock is held, a rank has found its attempt, and not one that ended
earlier or belongs to another launch. Rank 0 therefore waits for the other ranks before it ends.

A rank that cannot take part in the attempt says so in a file, since rank 0 may be anywhere by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from stoker import storage
from stoker.errors import BadInput, StokerError
from stoker.run import journal
from stoker.run.directory import RunDirectory

TIMEOUT = 600.0  # seconds; loading code and data on rank 0 comes first
_LATE = 5.0  # seconds that rank 0 waits at its end for ranks that have not joined; some may never join
_INTERVAL = 0.05
_ASKS = 5.0  # seconds between two questions whether it can come at all
_LETS_GO = 30.0  # seconds for rank 0 to see a refusal; over NFS a new file can be late
_REFUSAL = "refusal.json"


@dataclass(frozen=True)
class Opening:
    """One opening of a run: its unique id, and the launch that opened the run."""

    id: str
    launch: str


def wait(
    run: RunDirectory,
    launch: str,
    rank: int,
    timeout: float = TIMEOUT,
    refused: Callable[[], str] = str,
) -> tuple[int, dict[str, Any]]:
    """Wait for the attempt that rank 0 of this launch starts; returns its number and first event.

    An attempt that this rank has already joined is over for it, even if rank 0 has not ended it yet.

    Args:
        refused: asked every few seconds why this rank cannot take part; empty as long as it may.

    Raises:
        BadInput: it cannot.
        StokerError: after the timeout.
    """
    begun = time.monotonic()
    asks = begun + _ASKS
    while (now := time.monotonic()) < begun + timeout:
        found = _begun(run, launch)
        if found is not None and not journal.has_joined(run.journal, found[0], rank):
            return found
        if now > asks:
            asks = now + _ASKS
            if said := refused():
                raise BadInput(said)
        time.sleep(_INTERVAL)
    raise StokerError(f"rank 0 of this launch did not open {run.path} within {timeout:.0f} s")


def wait_for_others(run: RunDirectory, attempt: int, size: int, timeout: float = _LATE) -> None:
    """Wait until all ranks have joined an attempt: they would not find it after it has ended."""
    deadline = time.monotonic() + timeout
    while journal.ranks(run.journal, attempt) < size and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def refuse(run: RunDirectory, opening: str, said: str) -> None:
    """Say why this rank cannot take part in an attempt, and wait until rank 0 has let go of the run."""
    if run.exists():  # another rank may have refused first
        storage.try_to_write_json(run.path / _REFUSAL, {"opening": opening, "said": said})
    deadline = time.monotonic() + _LETS_GO
    while run.alive and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def refusal(run: RunDirectory, opening: str) -> str:
    """Why a rank cannot take part in the attempt of this opening; empty if none has said so."""
    found = storage.read_json(run.path / _REFUSAL)
    return str(found["said"]) if found.get("opening") == opening else ""


def end_refusal(run: RunDirectory) -> None:
    """Remove what a rank has said: it is about an attempt that is over."""
    (run.path / _REFUSAL).unlink(missing_ok=True)


def opened(run: RunDirectory) -> Opening | None:
    """The newest opening of a run, as far as it is seen here."""
    try:
        return Opening(**orjson.loads(run.lock_file.read_bytes()))
    except (OSError, orjson.JSONDecodeError, TypeError):
        return None


def _begun(run: RunDirectory, launch: str) -> tuple[int, dict[str, Any]] | None:
    opening = opened(run)
    if opening is None or opening.launch != launch or not run.alive:
        return None
    newest = journal.newest_attempt(run.journal)
    if newest is not None and newest[1].get("opening") == opening.id:
        return newest
    return None
