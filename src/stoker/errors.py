"""The errors a user meets, each with the exit code its command ends with.

An error says what arrived, what is allowed and what to change. Our own bugs are
`assert`s, and never come through here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIFFERS = 3  # of `stoker reproduce`: it ran, and the result is another
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: what Slurm and others take as "requeue me"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class StokerError(Exception):
    """Something went wrong that the user can act on; the command exits with 1."""

    exit_code = EXIT_FAILED
    again = False
    """Whether it may go better when it is tried again as it is."""
    changed = False
    """Whether what is tried again is something else than what failed: that costs no restart."""


class OutOfMemory(StokerError):
    """Memory ran out.

    Args:
        less: whether the next attempt takes less by itself (`micro_batch=auto`).
    """

    def __init__(self, said: str, *, less: bool = False) -> None:
        super().__init__(said)
        self.again = self.changed = less


class BadInput(StokerError):
    """What the user gave cannot be used: nothing was started, no run is left behind; exit code 2."""

    exit_code = EXIT_BAD_INPUT


class BadWorldSize(BadInput):
    """What the user gave does not go with so many ranks; with another number of them it may."""


class Stopped(SystemExit):
    """Training was told to stop and has stopped at a step boundary, after a checkpoint.

    A `SystemExit`, so that it passes through a user's `except Exception` and ends a plain
    script with the right exit code: 75 after SIGTERM (requeue me), 130 after Ctrl-C.
    """

    def __init__(self, status: str) -> None:
        self.status = status
        super().__init__(EXIT_INTERRUPTED if status == "interrupted" else EXIT_PREEMPTED)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed name, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
