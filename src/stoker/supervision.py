"""What ranks tell the process that started them, through small files in the launch's folder.

Each rank writes its progress, and when it last made some, to a memory-mapped file. The supervisor reads these
files (`launch/pulses.py`), detects a rank that hangs, and makes all ranks write their stacks, which works
even if a rank is stuck in C code (see `faulthandler`). Without a supervisor, a thread of the process itself
does this: see `launch/alone.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "STOKER_LAUNCH_FOLDER"
"""The environment variable with the path of that folder."""
RUN = "run"
"""The file in that folder that holds the run's path."""
TWICE = "told-twice"
"""The file that exists in that folder once the ranks were told twice to stop."""
REFUSED = "refused"
"""The file in that folder that says why another rank cannot take part."""
STACKS = signal.SIGUSR2
"""The signal that makes a rank write the stacks of its threads."""

LAYOUT = struct.Struct("<qqddd?")
"""The content of the file of a rank's pulse."""
_FIRST = 1800.0  # seconds that the first step may take, which may compile and fill caches
_AT_LEAST = 300.0  # seconds without progress before a rank counts as hanging, by default
_TIMES = 20.0  # the same, as a multiple of the longest pause so far


@dataclass(frozen=True)
class Pulse:
    """The progress of a rank."""

    step: int = -1
    """Completed steps; -1 before the training loop."""
    saved: int = -1
    """The step of the newest checkpoint on disk."""
    at: float = 0.0
    """Time of the last progress, by the machine's monotonic clock."""
    limit: float = 0.0
    """Seconds without progress after which the rank counts as hanging; 0: no limit."""
    joining: float = 0.0
    """Time since which it waits for the other ranks to start, by the same clock; 0: it does not wait."""
    begun: bool = False
    """Whether this process has completed a step; `step` may also count the steps of a checkpoint."""

    def nothing_for(self, seconds: float) -> str:
        """A phrase that says since when the rank made no progress."""
        since = f"after step {self.step}" if self.begun else "before the end of its first step"
        return f"no progress {since} for {seconds:.0f} s"


class Heart:
    """Writes a rank's pulse. Without a supervisor, it is only kept in `pulse`.

    Args:
        limit: seconds without progress after which the rank counts as hanging; by default derived from the
            run's step times.
        at_least: the smallest default.
    """

    def __init__(self, limit: float | None = None, at_least: float = _AT_LEAST) -> None:
        self.pulse = Pulse()
        """The newest pulse, a new object at each beat."""
        self._limit, self._at_least = limit, at_least
        self._step, self._saved = -1, -1
        self._last = 0.0
        self._longest = 0.0
        self._begun = self._over = False
        self._memory = _memory_of_this_rank()

    def begin(self, step: int) -> None:
        """Record that the loop begins after `step` completed steps."""
        self._step, self._over = step, False
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Record progress; `step` is the number of completed steps."""
        if self._over:
            return
        now = time.monotonic()
        if self._last and self._begun:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        if step is not None:
            self._step, self._begun = step, True
        limit = self._limit or max(self._at_least, _TIMES * self._longest)
        self._write(now, limit if self._begun else max(_FIRST, limit))

    def saved(self, step: int) -> None:
        """Record that a checkpoint is on disk."""
        self._saved = step
        self.beat()

    def pause(self) -> None:
        """Stop monitoring, because the loop is over: what follows has no time limit."""
        self._over = True
        self._write(time.monotonic(), 0.0)

    def _write(self, now: float, limit: float) -> None:
        self.pulse = Pulse(self._step, self._saved, now, limit, begun=self._begun)
        if self._memory is not None:
            _put(self._memory, self.pulse)


def joining(yes: bool) -> None:
    """Record whether this rank is waiting for the others to start."""
    memory = _memory_of_this_rank()
    if memory is not None:
        now = time.monotonic()
        _put(memory, Pulse(at=now, joining=now if yes else 0.0))


_open: list[object] = []


def write_stacks_to(file: Path) -> None:
    """Write the stacks of all threads to a file at the signal STACKS; without a supervisor, do nothing."""
    if _folder() is None:
        return
    opened = file.open("w", encoding="utf-8")  # stays open: faulthandler writes to its descriptor
    faulthandler.register(STACKS, file=opened, all_threads=True)
    _open.append(opened)


def say_where(run: Path) -> None:
    """Tell the supervisor the path of the run."""
    _say(RUN, str(run))


def say_refused(said: str) -> None:
    """Tell the supervisor that this rank ends because another one cannot take part, and why."""
    with contextlib.suppress(OSError):
        _say(REFUSED, said)


def told_twice() -> bool | None:
    """Whether the supervisor was told twice to stop; None without one."""
    folder = _folder()
    return None if folder is None else (folder / TWICE).exists()


def _folder() -> Path | None:
    """The launch's folder; None without a supervisor."""
    folder = os.environ.get(FOLDER)
    return None if folder is None else Path(folder)


def _say(name: str, text: str) -> None:
    """Write a file of the launch's folder, if there is one."""
    folder = _folder()
    if folder is not None:
        (folder / name).write_text(text, encoding="utf-8")


def _put(memory: mmap.mmap, pulse: Pulse) -> None:
    p = pulse
    LAYOUT.pack_into(memory, 0, p.step, p.saved, p.at, p.limit, p.joining, p.begun)


def _memory_of_this_rank() -> mmap.mmap | None:
    """The file of this rank's pulse; None without a supervisor."""
    folder = _folder()
    if folder is None:
        return None
    file = folder / f"rank-{os.environ.get('RANK', '0')}.pulse"
    with file.open("a+b") as opened:
        if opened.seek(0, os.SEEK_END) < LAYOUT.size:
            opened.write(LAYOUT.pack(-1, -1, time.monotonic(), 0.0, 0.0, False))
            opened.flush()
        return mmap.mmap(opened.fileno(), LAYOUT.size)
