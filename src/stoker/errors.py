"""Errors that are shown to users, and the exit codes of commands that end with them.

Their messages say what was given, what is allowed and what to change. Internal invariants are checked with
`assert` instead.
"""

from __future__ import annotations

import contextlib
import difflib
import linecache
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from stoker.status import INTERRUPTED, PREEMPTED

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIFFERS = 3  # `stoker reproduce`: the result differs; `stoker plan`: the run does not fit into memory
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, a request to be requeued
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
STOP_CODES = {PREEMPTED: EXIT_PREEMPTED, INTERRUPTED: EXIT_INTERRUPTED}
"""The exit codes of a process that was told to stop, by the status of its run."""


class StokerError(Exception):
    """An error that the user can act on; the command exits with 1."""

    exit_code = EXIT_FAILED
    again = False
    """Whether an unchanged retry may succeed."""
    changed = False
    """Whether a retry does something other than what failed; it does not count as a restart then."""


class OutOfMemory(StokerError):
    """Memory ran out.

    Args:
        less: whether the next attempt uses less memory by itself (`micro_batch=auto`).
    """

    def __init__(self, said: str, *, less: bool = False) -> None:
        super().__init__(said)
        self.again = self.changed = less


class BadInput(StokerError):
    """The input cannot be used: nothing was started and no run is left behind; exit code 2."""

    exit_code = EXIT_BAD_INPUT


class BadWorldSize(BadInput):
    """The input does not fit this number of ranks, but may fit another."""


class Stopped(SystemExit):
    """The process was told to stop. A training loop stops at a step boundary, after a checkpoint.

    It is a `SystemExit`, so that it passes through a user's `except Exception` and ends a plain script with
    the right exit code: 75 after SIGTERM (to be requeued), 130 after Ctrl-C or SIGHUP.
    """

    def __init__(self, status: str) -> None:
        self.status = status
        super().__init__(STOP_CODES.get(status, EXIT_PREEMPTED))

    def __reduce__(self) -> tuple[type[Stopped], tuple[str]]:
        return Stopped, (self.status,)


@contextlib.contextmanager
def stops_as_raised() -> Iterator[None]:
    """Raise `Stopped` and KeyboardInterrupt as themselves where Python 3.11 turned them into a RuntimeError.

    It does so if the signal comes while a class is being created, as imports do all the time.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, Stopped | KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def nearest(name: str, allowed: Iterable[str], alike: float = 0.5) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed name, or an empty string.

    Args:
        alike: the least similarity of a match; 1: equal, 0: no letter in common.
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=alike)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def trace_of(error: BaseException) -> str:
    """The traceback of an error, from the first line of the user's own code on.

    The frames before it, stoker's path to the recipe, do not help the recipe's author. An error without a
    frame of the user's code is stoker's own, and its whole traceback is shown.
    """
    shown = error.__traceback__
    while shown is not None and not _is_users(shown):
        shown = shown.tb_next
    if shown is None and isinstance(error, SyntaxError):  # the user's file was not run, so it has no frame
        return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, shown or error.__traceback__))


def line_of(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback: `my_train.py:31: loss.item()`, or empty."""
    found, frame = "", error.__traceback__
    while frame is not None:
        if _is_users(frame):
            file, number = frame.tb_frame.f_code.co_filename, frame.tb_lineno
            found = f"{Path(file).name}:{number}: {linecache.getline(file, number).strip()}"
        frame = frame.tb_next
    return found


def _is_users(frame: TracebackType) -> bool:
    """Whether a frame is in the user's own code: not in stoker, an installed package or Python itself."""
    file = frame.tb_frame.f_code.co_filename
    if file.startswith("<frozen"):
        return False
    paths = sysconfig.get_paths()
    installed = [Path(__file__).parent, *(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))]
    return not any(Path(file).is_relative_to(folder) for folder in installed)
