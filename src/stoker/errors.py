"""The errors a user meets, each with the exit code its command ends with.

An error says what arrived, what is allowed and what to change. Our own bugs are
`assert`s, and never come through here.
"""

from __future__ import annotations

import difflib
import linecache
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIFFERS = 3  # of `stoker reproduce`: the result is another; of `stoker plan`: it does not fit
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


def nearest(name: str, allowed: Iterable[str], alike: float = 0.5) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed name, or an empty string.

    Args:
        alike: how near it must be; 1 is equal, 0 has no letter in common.
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=alike)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def trace_of(error: BaseException) -> str:
    """The traceback of an error, from the first line of the user's own code on.

    What led there, a command's way to a recipe, says nothing to whoever wrote the recipe. Where no code of
    the user's is part of it, the error is one of ours, and all of it is shown.
    """
    shown = error.__traceback__
    while shown is not None and not _is_users(shown):
        shown = shown.tb_next
    if shown is None and isinstance(error, SyntaxError):  # of the file itself, which has no frame yet
        return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, shown or error.__traceback__))


def line_of(error: BaseException) -> str:
    """The user's own line that an error came of, `my_train.py:31: loss.item()`; empty where none is."""
    found, frame = "", error.__traceback__
    while frame is not None:
        if _is_users(frame):
            file, number = frame.tb_frame.f_code.co_filename, frame.tb_lineno
            found = f"{Path(file).name}:{number}: {linecache.getline(file, number).strip()}"
        frame = frame.tb_next
    return found


def _is_users(frame: TracebackType) -> bool:
    """Whether it is neither of this package nor of what is installed, Python itself included."""
    file = frame.tb_frame.f_code.co_filename
    if file.startswith("<frozen"):
        return False
    paths = sysconfig.get_paths()
    installed = [Path(__file__).parent, *(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))]
    return not any(Path(file).is_relative_to(folder) for folder in installed)
