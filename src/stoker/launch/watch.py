"""What the launcher does while its ranks run: pass signals on, end those that would not end by themselves."""

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
from pathlib import Path
from types import FrameType

from stoker import stopping, supervision, words
from stoker.errors import Stopped
from stoker.launch import ranks

log = logging.getLogger("stoker")

_EVERY = 0.1  # seconds
_LAST_WORDS = 5.0  # seconds that the other ranks have to end, once one has failed
_WAITING = 0.5  # seconds of these after which those are ended that only wait for others to come up
_STACKS = 1.0  # seconds that ranks have to write their stacks
_COMING_UP = 60.0  # seconds that all ranks together have to find each other
_ASLEEP = 10.0  # seconds between two looks after which this launcher, as its ranks, was stopped meanwhile
_NAMED = 4  # places, and ranks at each, that a message names
_AT_ONCE = 1.0  # seconds that ranks have to end, once they were told twice


@dataclass
class Watch:
    """One launch as it is watched."""

    folder: Path
    count: int
    """Ranks of the launch."""
    told: int = 0
    """The signal by which all ranks were told to stop; 0 where they were not."""
    ask_to_stop: bool = False
    """Whether all ranks are to stop although this launcher was not told to."""
    at_once: bool = False
    """Whether they were told twice."""
    abandoned: bool = False
    """Whether ranks were ended that could not hear that, on their way to others which had stopped."""
    verdict: str = ""
    """Why all ranks were ended, where they were."""
    outside: Callable[[], str] = lambda: ""
    """Why they are to be ended for what happens elsewhere; nothing while they are not."""
    _told_at: float = 0.0
    _looked: float = field(default_factory=time.monotonic)
    _awake: float = 0.0
    """Since when it has looked without a pause."""
    _over: threading.Event = field(default_factory=threading.Event)
    _heard: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Watch until it is over, whatever goes wrong meanwhile; in a thread."""
        said = ""
        while not self._over.wait(_EVERY):
            try:
                self._look()
            except Exception as error:
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("the ranks are watched only partly: %s", said)

    def _look(self) -> None:
        if self.told or self.ask_to_stop:
            self._tell(self.told or signal.SIGUSR1)
        self.verdict = self._hanging() or self.outside()
        if self.verdict:
            self._end_all()
        elif self._stopped_before_all_came_up():
            self._over.wait(_LAST_WORDS)
            self.abandoned = not self._over.is_set()
            self._end_all()
        elif ranks.failed(self.folder):
            self._let_end()
            self._end_all()

    def stop(self) -> None:
        """There is nothing left to watch."""
        self._over.set()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Have all ranks stop; a second signal ends those too that cannot hear it: they wait in C code."""
        if not ranks.pids(self.folder):
            raise Stopped(stopping.STATUS[number])
        if self.told:
            self.signal(number)
            if not self.at_once and stopping.is_another(number, self._told_at):
                self.at_once = True
                end = threading.Timer(_AT_ONCE, self._end_all)
                end.daemon = True
                end.start()
        else:
            self._told_at = time.monotonic()
        self.told = number

    def _tell(self, number: int) -> None:
        """Tell those ranks to stop that have not been told: some may have come up since."""
        for pid in ranks.pids(self.folder).values():
            if pid not in self._heard:
                self._heard.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def signal(self, number: int) -> None:
        """Send a signal to every rank that lives."""
        for pid in ranks.pids(self.folder).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _let_end(self) -> None:
        """Give the other ranks time to end by themselves.

        Those that wait, in C code, for one that is gone to come up hear nothing, and have nothing to finish.
        """
        busy = begun = time.monotonic()
        while (now := time.monotonic()) < begun + _LAST_WORDS and not self._over.wait(_EVERY):
            if not self._all_wait():
                busy = now
            elif now - busy > _WAITING:
                break

    def _all_wait(self) -> bool:
        """Whether there are ranks that live, and all of them wait for others to come up."""
        pulses = supervision.read(self.folder)
        living = ranks.living(self.folder)
        return bool(living) and all(rank in pulses and pulses[rank].joining for rank in living)

    def _end_all(self) -> None:
        while not self._over.is_set():
            self.signal(signal.SIGKILL)
            self._over.wait(_EVERY)

    def _stopped_before_all_came_up(self) -> bool:
        """Whether a rank has stopped as it was told to, and the others may wait for it without end."""
        began = any(pulse.begun for pulse in supervision.read(self.folder).values())
        return bool(self.told or self.ask_to_stop) and not began and bool(ranks.ends(self.folder))

    def _hanging(self) -> str:
        """What is said of ranks that stand still, once they have written their stacks; else nothing."""
        now = time.monotonic()
        if now - self._looked > _ASLEEP:  # a scheduler stops, and lets go on, all processes of a job
            self._awake = now
        self._looked = now
        pulses = supervision.read(self.folder)
        together = len(pulses) == self.count and all(p.joining for p in pulses.values())
        if together and now - max(self._awake, *(p.joining for p in pulses.values())) > _COMING_UP:
            return f"the ranks did not find each other within {_COMING_UP:.0f} s"
        slow = {rank: p for rank, p in pulses.items() if p.limit and now - max(self._awake, p.at) > p.limit}
        if not slow:
            return ""
        self.signal(supervision.STACKS)
        self.signal(signal.SIGCONT)  # one that was stopped answers too
        self._over.wait(_STACKS)
        pulse = min(slow.values(), key=lambda pulse: pulse.at)
        who = f"rank {min(slow)} hangs" if len(slow) == 1 else f"{len(slow)} ranks hang"
        said = f"{who}: {pulse.nothing_for(now - pulse.at)}"
        try:
            folder = self._keep_stacks()
            return f"{said}{_places(folder)}; the stacks of all ranks are in {folder}"
        except OSError as error:  # they are to be ended all the same
            return f"{said}; the stacks of the ranks could not be saved ({error})"

    def _keep_stacks(self) -> Path:
        """Move the stacks to the run's logs; returns where they are."""
        run = supervision.run_of(self.folder)
        target = supervision.stacks_folder(run / "logs" if run is not None else self.folder)
        for stacks in self.folder.glob("rank-*.stacks"):
            shutil.copy(stacks, target / f"{stacks.stem}.txt")
        return target


def _places(folder: Path) -> str:
    """Where the ranks are, in words, by their stacks; those that are at the same place, together."""
    ranks_at: dict[str, list[str]] = {}
    for file in sorted(folder.glob("rank-*.txt"), key=lambda file: int(file.stem.removeprefix("rank-"))):
        if place := supervision.place(file.read_text(encoding="utf-8", errors="replace")):
            ranks_at.setdefault(place, []).append(file.stem.removeprefix("rank-"))
    if not ranks_at:
        return ""
    said = [f"rank{'s' if len(at) > 1 else ''} {words.some(at, _NAMED)} at {p}" for p, at in ranks_at.items()]
    why = " (a collective that not all ranks call waits for ever)" if len(said) > 1 else ""
    return f"; {words.some(said, _NAMED)}{why}"


@contextlib.contextmanager
def watching(folder: Path, count: int, outside: Callable[[], str]) -> Iterator[Watch]:
    """Watch the ranks of a launch, and hand SIGTERM, SIGUSR1 and Ctrl-C to them, within this block."""
    watch = Watch(folder, count, outside=outside)
    thread = threading.Thread(target=watch.run, name="watch-ranks", daemon=True)
    thread.start()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, watch.pass_on) for number in stopping.STATUS} if main else {}
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
