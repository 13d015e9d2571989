"""What the launcher does while its ranks run: pass on signals, and end ranks that do not end themselves."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import process
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from stoker import signals, supervision, words
from stoker.errors import Stopped
from stoker.launch import pulses, ranks

log = logging.getLogger("stoker")

_EVERY = 0.1  # seconds
_LAST_WORDS = 5.0  # seconds for the other ranks to end, once one has failed
_WAITING = 0.5  # of these, seconds after which ranks are ended that only wait for others to start
_STACKS = 1.0  # seconds in which stacks do not grow any more once they are written
_STACKS_AT_MOST = 10.0  # seconds for ranks to write them
_COMING_UP = 60.0  # seconds for all ranks to find each other
_ASLEEP = 10.0  # seconds between two looks that mean that this launcher, like its ranks, was suspended
_NAMED = 4  # places, and ranks at each, named in a message
_AT_ONCE = 1.0  # seconds for ranks to end after being told twice


@dataclass
class Watch:
    """Supervises one launch."""

    folder: Path
    count: int
    """Ranks of the launch."""
    told: int = 0
    """The signal with which all ranks were told to stop; 0 if they were not."""
    ask_to_stop: bool = False
    """Whether all ranks should stop although this launcher was not told to."""
    at_once: bool = False
    """Whether they were told twice."""
    abandoned: bool = False
    """Whether ranks were ended that could not receive signals while waiting for ranks that had stopped."""
    verdict: str = ""
    """Why all ranks were ended, if they were."""
    outside: Callable[[], str] = lambda: ""
    """Why they must be ended because of events elsewhere; empty if they need not be."""
    _ended: set[int] = field(default_factory=set)
    """The ranks that this launcher has killed."""
    _processes: set[BaseProcess] = field(default_factory=set)
    """Those of the ranks, as far as they were seen."""
    _requests: signals.Requests = field(default_factory=signals.Requests)
    _looked: float = field(default_factory=time.monotonic)
    _awake: float = 0.0
    """Since when it has been looking without interruption."""
    _over: threading.Event = field(default_factory=threading.Event)
    _heard: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Watch until the launch is over, despite any errors; runs in a thread."""
        said = ""
        while not self._over.wait(_EVERY):
            try:
                self._look()
            except Exception as error:
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("the ranks are watched only partly: %s", said)

    def _look(self) -> None:
        self._processes |= process._children  # type: ignore[attr-defined]  # active_children() polls them
        early = self._stopped_before_all_came_up()
        if self.told or self.ask_to_stop or early:
            self._tell(self.told or signal.SIGUSR1)
        self.verdict = self._hanging() or self.outside()
        if self.verdict:
            self._end_all()
        elif early:
            self._over.wait(_LAST_WORDS)
            self.abandoned = not self._over.is_set()
            self._end_all()
        elif ranks.failed(self.folder):
            self._let_end()
            self._end_all()

    def killed(self) -> list[int]:
        """The ranks of a launch that is over which something else than this launcher has killed."""
        codes = {one.pid: one.exitcode for one in self._processes}
        found = {rank for rank, pid in ranks.pids(self.folder).items() if codes.get(pid) == -signal.SIGKILL}
        return sorted(found - self._ended)

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Make all ranks stop; a second signal also ends those that cannot receive it, waiting in C code."""
        new, told_before = self._requests.is_new(number), self.told
        if not ranks.pids(self.folder):
            # The ranks are told when they start, if what is raised here is lost in a callback of an import.
            if new:
                self.told = number
                raise Stopped(signals.STATUS[number])
            return
        if new and self._requests.count > 1 and not self.at_once:
            self.at_once = True
            pulses.tell_twice(self.folder)
            end = threading.Timer(_AT_ONCE, self._end_all)
            end.daemon = True
            end.start()
        if told_before:  # otherwise the thread that watches tells them
            self.signal(number)
        self.told = number

    def _tell(self, number: int) -> None:
        """Tell the ranks to stop that have not been told yet: some may have started since."""
        for pid in ranks.pids(self.folder).values():
            if pid not in self._heard:
                self._heard.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def signal(self, number: int) -> None:
        """Send a signal to every living rank."""
        for pid in ranks.pids(self.folder).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _let_end(self) -> None:
        """Give the other ranks time to end by themselves.

        Ranks that wait in C code for a dead rank to start cannot receive signals, and have nothing to finish.
        """
        busy = begun = time.monotonic()
        while (now := time.monotonic()) < begun + _LAST_WORDS and not self._over.wait(_EVERY):
            if not self._all_wait():
                busy = now
            elif now - busy > _WAITING:
                break

    def _all_wait(self) -> bool:
        """Whether there are living ranks, and all of them wait for others to start."""
        beats = pulses.read(self.folder)
        living = ranks.living(self.folder)
        return bool(living) and all(rank in beats and beats[rank].joining for rank in living)

    def _end_all(self) -> None:
        while not self._over.is_set():
            for rank, pid in ranks.pids(self.folder).items():
                if ranks.runs(pid):
                    self._ended.add(rank)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._over.wait(_EVERY)

    def _stopped_before_all_came_up(self) -> bool:
        """Whether a rank has stopped as told, maybe it alone, while others may wait for it for ever."""
        ends = ranks.ends(self.folder).values()
        alone = any(end.code and not end.error for end in ends) and not ranks.failed(self.folder)
        told = self.told or self.ask_to_stop or alone
        return bool(told and ends) and not any(p.begun for p in pulses.read(self.folder).values())

    def _hanging(self) -> str:
        """A message about hanging ranks, after they have written their stacks; otherwise empty."""
        now = time.monotonic()
        if now - self._looked > _ASLEEP:  # a scheduler can suspend and continue all processes of a job
            self._awake = now
        self._looked = now
        beats = pulses.read(self.folder)
        together = len(beats) == self.count and all(p.joining for p in beats.values())
        if together and now - max(self._awake, *(p.joining for p in beats.values())) > _COMING_UP:
            return f"the ranks did not find each other within {_COMING_UP:.0f} s"
        slow = {rank: p for rank, p in beats.items() if p.limit and now - max(self._awake, p.at) > p.limit}
        if not slow:
            return ""
        self.signal(supervision.STACKS)
        self.signal(signal.SIGCONT)  # a suspended one must answer too
        self._await_stacks()
        pulse = min(slow.values(), key=lambda pulse: pulse.at)
        who = f"rank {min(slow)} hangs" if len(slow) == 1 else f"{len(slow)} ranks hang"
        said = f"{who}: {pulse.nothing_for(now - pulse.at)}"
        try:
            folder = self._keep_stacks()
            return f"{said}{_places(folder)}; the stacks of all ranks are in {folder}"
        except OSError as error:  # they must be ended anyway
            return f"{said}; the stacks of the ranks could not be saved ({error})"

    def _await_stacks(self) -> None:
        """Wait until the ranks have written their stacks, for which each needs a share of the processor."""
        begun = grown = time.monotonic()
        before: list[int] = []
        while (now := time.monotonic()) < begun + _STACKS_AT_MOST and not self._over.wait(_EVERY):
            sizes = [_size(self.folder / f"rank-{rank}.stacks") for rank in ranks.living(self.folder)]
            if sizes != before:
                before, grown = sizes, now
            elif all(sizes) and now - grown >= _STACKS:
                break

    def _keep_stacks(self) -> Path:
        """Move the stacks to the run's logs; returns where they are."""
        run = pulses.run_of(self.folder)
        target = pulses.stacks_folder(run / "logs" if run is not None else self.folder)
        for stacks in self.folder.glob("rank-*.stacks"):
            shutil.copy(stacks, target / f"{stacks.stem}.txt")
        return target


def _size(file: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return file.stat().st_size if file.exists() else 0


def _places(folder: Path) -> str:
    """Where the ranks are according to their stacks, as text; ranks at the same place are grouped."""
    ranks_at: dict[str, list[str]] = {}
    for file in sorted(folder.glob("rank-*.txt"), key=lambda file: int(file.stem.removeprefix("rank-"))):
        if place := pulses.place(file.read_text(encoding="utf-8", errors="replace")):
            ranks_at.setdefault(place, []).append(file.stem.removeprefix("rank-"))
    if not ranks_at:
        return ""
    said = [f"rank{'s' if len(at) > 1 else ''} {words.some(at, _NAMED)} at {p}" for p, at in ranks_at.items()]
    why = " (a collective that not all ranks call waits for ever)" if len(said) > 1 else ""
    return f"; {words.some(said, _NAMED)}{why}"


@contextlib.contextmanager
def watching(folder: Path, count: int, outside: Callable[[], str]) -> Iterator[Watch]:
    """Watch the ranks of a launch, and pass the signals that stop a run to them, within this block."""
    watch = Watch(folder, count, outside=outside)
    thread = threading.Thread(target=watch.run, name="watch-ranks", daemon=True)
    thread.start()
    with signals.handled(watch.pass_on, signals.STATUS):
        try:
            yield watch
        finally:
            watch.stop()
            thread.join()
