"""A training without a launcher watches itself: a single process, or a rank of `torchrun`.

A thread checks the heartbeat of the loop once a second. If the loop stands still for longer than a launcher
would allow, the stacks of its threads are written, and the process is ended, or, since nobody would restart
it and it may just be slow, only warned about. A process that hangs in C code while holding Python's GIL can
only be detected by a launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from stoker import supervision
from stoker.attempt import Attempt
from stoker.errors import EXIT_FAILED
from stoker.launch import pulses
from stoker.periodic import Periodic, Task
from stoker.run import journal
from stoker.supervision import Pulse

log = logging.getLogger("stoker")

_EVERY = 1.0  # seconds
_OTHERS = 2.0  # seconds for other ranks, which stand still too, to write their stacks
_LAST_WORDS = 10.0  # seconds after which it ends, whatever blocks the writing
_DEBUGGERS = {"pdb", "bdb", "_pydevd_bundle"}


@contextlib.contextmanager
def watching(attempt: Attempt, say: Callable[[str], None], *, ends: bool) -> Iterator[None]:
    """Within this block, watch for the loop standing still, unless a launcher does.

    Args:
        say: called with what happened, before the end.
        ends: whether to end the process then.
    """
    if supervision.FOLDER in os.environ:
        yield
        return
    watch = _Watch(attempt, say, ends=ends)
    looks = Periodic([Task(_EVERY, watch.look)], "watch-self")
    try:
        yield
    finally:
        looks.close()


class _Watch:
    """Checks the loop's position once a second."""

    def __init__(self, attempt: Attempt, say: Callable[[str], None], *, ends: bool) -> None:
        self._attempt, self._say, self._ends = attempt, say, ends
        self._pulse, self._warned = Pulse(), Pulse()
        self._quiet, self._looked = 0.0, time.monotonic()

    def look(self) -> None:
        """Check whether it has moved since the last look."""
        attempt, now, before = self._attempt, time.monotonic(), self._pulse
        passed = min(now - self._looked, 2 * _EVERY)  # excluding time stopped by Ctrl-Z
        self._looked = now
        self._pulse = pulse = attempt.heart.pulse if attempt.heart is not None else before
        self._quiet = self._quiet + passed if pulse is before and not _debugged() else 0.0
        if not pulse.limit or self._quiet <= pulse.limit:
            return
        said = pulse.nothing_for(self._quiet)
        if self._ends:
            _end(attempt, f"it hangs: {said}", self._say)
        elif self._warned is not pulse:
            self._warned = pulse
            log.warning("%s; %s; to end such a run, set for example hang_limit=30min", said, _stacks(attempt))


def _stacks(attempt: Attempt) -> str:
    """Write the stacks of all threads; returns where the process is, and where they are, as text."""
    folder = pulses.stacks_folder(attempt.directory.logs)
    file = folder / f"rank-{attempt.world.rank}.txt"
    with file.open("w", encoding="utf-8") as opened:
        faulthandler.dump_traceback(opened, all_threads=True)
    place = pulses.place(file.read_text(encoding="utf-8", errors="replace"))
    return f"{f'it is at {place}; ' if place else ''}the stacks of all threads are in {folder}"


def _end(attempt: Attempt, said: str, say: Callable[[str], None]) -> None:
    """Write the stacks of all threads, report what happened, and end."""
    end = threading.Timer(_LAST_WORDS, os._exit, (EXIT_FAILED,))
    end.daemon = True
    end.start()
    said = f"{said}; {_stacks(attempt)}"
    journal.note_failure(attempt.directory.journal, attempt.number, said)
    say(said)
    if attempt.world.size > 1:
        time.sleep(_OTHERS)
    os._exit(EXIT_FAILED)


def _debugged() -> bool:
    """Whether a debugger has stopped the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
