"""What ranks and whoever started them tell each other, by small files in a folder of the launch.

A rank keeps a few numbers in memory that is a file: how far it is, and when it was there. Whoever
supervises it reads them, tells a rank that is at work from one that hangs, and has all ranks write
their stacks, which works also where a rank is stuck within C code: see `faulthandler`. Where nobody
supervises, a thread of the process itself reads them: see `launch/alone.py`.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import struct
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "STOKER_LAUNCH_FOLDER"
"""The variable by which a rank finds the folder."""
RUN = "run"
"""The file of that folder that says where the run is."""
STACKS = signal.SIGUSR2
"""The signal on which a rank writes the stacks of its threads."""

_LAYOUT = struct.Struct("<qqddd?")
_FIRST = 1800.0  # seconds that the first step may take: it compiles, it fills caches
_AT_LEAST = 300.0  # seconds without a step before a rank counts as hanging, where nothing else is set
_TIMES = 20.0  # so many times the longest it has taken so far


@dataclass(frozen=True)
class Pulse:
    """How far a rank is."""

    step: int = -1
    """Steps that are done; -1 before the training loop."""
    saved: int = -1
    """The step of the newest checkpoint on disk."""
    at: float = 0.0
    """When it last moved, by the machine's monotonic clock."""
    limit: float = 0.0
    """Seconds without a move after which it hangs; 0: none."""
    joining: float = 0.0
    """Since when it waits for the other ranks to come up, by the same clock; 0: it does not."""
    begun: bool = False
    """Whether it has done a step; those before may be those of a checkpoint."""

    def nothing_for(self, seconds: float) -> str:
        """Since when there was nothing, in words."""
        since = f"after step {self.step}" if self.begun else "before the end of its first step"
        return f"nothing {since} for {seconds:.0f} s"


class Heart:
    """A rank's side. Where nobody supervises it keeps its pulse to itself.

    Args:
        limit: seconds without a step that count as hanging; by default by the run's own step time.
        at_least: that default is no less.
    """

    def __init__(self, limit: float | None = None, at_least: float = _AT_LEAST) -> None:
        folder = os.environ.get(FOLDER)
        self.pulse = Pulse()
        """The newest; another object with each beat."""
        self._limit, self._at_least = limit, at_least
        self._step, self._saved = -1, -1
        self._last = 0.0
        self._longest = 0.0
        self._begun = self._over = False
        self._memory: mmap.mmap | None = None
        if folder is not None:
            rank = int(os.environ.get("RANK", "0"))
            self._memory = _memory(Path(folder) / f"rank-{rank}.pulse")

    def begin(self, step: int) -> None:
        """Say that the loop begins, where so many steps were done before it."""
        self._step = step
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Say that this rank is at work; with a step, that so many are done."""
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
        """Say that a checkpoint is on disk."""
        self._saved = step
        self.beat()

    def pause(self) -> None:
        """From now on nothing says how long it takes: the loop is over."""
        self._over = True
        self._write(time.monotonic(), 0.0)

    def _write(self, now: float, limit: float) -> None:
        self.pulse = Pulse(self._step, self._saved, now, limit, begun=self._begun)
        if self._memory is not None:
            _put(self._memory, self.pulse)


def joining(yes: bool) -> None:
    """Say that this rank waits for the others to come up, or does no longer."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        now = time.monotonic()
        memory = _memory(Path(folder) / f"rank-{os.environ.get('RANK', '0')}.pulse")
        _put(memory, Pulse(at=now, joining=now if yes else 0.0))


def write_stacks_to(file: Path) -> None:
    """On STACKS write the stacks of all threads to a file, empty until then, where somebody supervises."""
    if os.environ.get(FOLDER) is None:
        return
    opened = file.open("w", encoding="utf-8")  # faulthandler writes to its descriptor
    faulthandler.register(STACKS, file=opened, all_threads=True)
    _open.append(opened)


def say_where(run: Path) -> None:
    """Say where the run is, to whoever supervises."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        (Path(folder) / RUN).write_text(str(run), encoding="utf-8")


def run_of(folder: Path) -> Path | None:
    """Where the run of a launch is, once a rank has said so."""
    file = folder / RUN
    return Path(file.read_text(encoding="utf-8")) if file.exists() else None


_open: list[object] = []


def read(folder: Path) -> dict[int, Pulse]:
    """The pulses of all ranks of a launch that have one."""
    found = {}
    for file in folder.glob("rank-*.pulse"):
        content = file.read_bytes()
        if len(content) == _LAYOUT.size:
            found[int(file.stem.removeprefix("rank-"))] = Pulse(*_LAYOUT.unpack(content))
    return found


def place(stacks: str) -> str:
    """Where a process is, by its stacks as `write_stacks_to` has them: `train.py:31 (in evaluate)`.

    That is the innermost line of the main thread that is neither a library's nor ours, and what it called.
    Nothing where there is no such line.
    """
    main = stacks.rpartition("(most recent call first):")[2]  # it is the last one
    called = ""
    for file, line, name in _FRAME.findall(main):
        if not file.startswith(_LIBRARIES):
            return f"{Path(file).name}:{line}{called}"
        called = f" (in {name})"
    return ""


_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_LIBRARIES = (
    *{sysconfig.get_path(kind) for kind in ("stdlib", "platlib", "purelib")},
    str(Path(__file__).parent),
    "<frozen",
)


def stacks_folder(logs: Path) -> Path:
    """A folder of a run's logs for stacks that are written now."""
    folder = logs / time.strftime("stacks-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _put(memory: mmap.mmap, pulse: Pulse) -> None:
    p = pulse
    _LAYOUT.pack_into(memory, 0, p.step, p.saved, p.at, p.limit, p.joining, p.begun)


def _memory(file: Path) -> mmap.mmap:
    with file.open("a+b") as opened:
        if opened.seek(0, os.SEEK_END) < _LAYOUT.size:
            opened.write(_LAYOUT.pack(-1, -1, time.monotonic(), 0.0, 0.0, False))
            opened.flush()
        return mmap.mmap(opened.fileno(), _LAYOUT.size)
