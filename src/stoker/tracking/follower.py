"""The follower: a separate process that ships a run's journal to the sinks.

Training starts it and does not wait for it. Twice a second it reads the part of the journal past its
ledger; it ends when the trainer is gone and everything is shipped. It can be killed at any moment:
the next one resumes, and whatever it sends again, a sink stores once. A failing sink is retried with
increasing delays, and training never notices.

    python -m stoker.tracking.follower [--once] RUN_DIRECTORY

`sweep_follower.py` ships the trials of a search.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stoker import signals, storage
from stoker.errors import BadInput
from stoker.periodic import backoff
from stoker.run import journal, messages
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor
from stoker.tracking import feed, ledger
from stoker.tracking.ledger import Ledger
from stoker.tracking.shipper import Shipper
from stoker.tracking.sinks import SINKS, WHERE, enabled

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between looks at the journal
LONGEST_BACKOFF = 30.0  # most seconds between attempts of a failing sink during training
SHARE = 0.1  # of a core that a sink may use during training; the rest waits
PATIENCE = 60.0  # seconds for which a failing sink is retried once the trainer is gone
ONCE_PATIENCE = 10.0  # the same for `stoker sync`, where a user waits
LOG = "follower.log"
_REPORTED_AFTER = 2  # failures in a row; a single one may be a locked database


@dataclass(frozen=True)
class SinkState:
    """The progress of a sink."""

    name: str
    where: str
    """The store and the run in it."""
    pending: int
    """The number of events it has not received yet, including the end of the run."""
    error: str | None
    since: float | None
    """When it started to fail, in seconds since 1970."""


def spawn(directory: RunDirectory, once: bool = False) -> subprocess.Popen[bytes]:
    """Start a follower of a run; with `once` it ships what is there now and then exits."""
    flags = ["--once"] if once else []
    return signals.start_service(
        "stoker.tracking.follower", *flags, str(directory.path.absolute()), log=directory.logs / LOG
    )


def state(directory: RunDirectory) -> list[SinkState]:
    """The progress of every sink of a run. Imports no sink."""
    return [_state(directory, name) for name in enabled()]


def failing(directory: RunDirectory) -> dict[str, str]:
    """The sinks of a run that are failing at the moment, each with the reason."""
    found = {name: ledger.load(ledger.file_of(directory, name)).error for name in enabled()}
    return {name: error for name, error in found.items() if error is not None}


def wait(directory: RunDirectory, process: subprocess.Popen[bytes], timeout: float) -> list[SinkState]:
    """Wait until a follower ends or reports that its sink fails, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        ledgers = [ledger.load(ledger.file_of(directory, name)) for name in enabled()]
        if any(one.error and one.pid == process.pid for one in ledgers):
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    return state(directory)


def rebuild(directory: RunDirectory) -> dict[str, str | None]:
    """Have the next follower recreate the run in every sink; returns the run's former id in each sink.

    The request is stored in the ledgers, so whatever is killed afterwards, the next follower resumes it.
    Raises BadInput while the run is being trained or followed.
    """
    directory.sinks.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        for name in enabled():
            lock = storage.try_lock(ledger.lock_of(directory, name))
            if lock is not None:
                held.callback(os.close, lock)
            if lock is None or directory.alive:
                doing = "trained" if directory.alive else f"shipped to {name}"
                raise BadInput(f"run {directory.id!r} is being {doing} now: rebuild it after that")
        now = journal.ends(directory.journal)
        return {name: _begin_anew(ledger.file_of(directory, name), now) for name in enabled()}


def _begin_anew(file: Path, now: dict[str, int]) -> str | None:
    known = ledger.load(file)
    Ledger(run=known.run, edition=uuid.uuid4().hex[:8], folded=now).save(file)
    return known.run


def follow(
    directory: RunDirectory,
    name: str,
    *,
    once: bool = False,
    patience: float = PATIENCE,
    hurry: bool = False,
) -> bool:
    """Ship a run to a sink; returns whether all of it was shipped.

    Continues until the trainer is gone, or with `once` until everything in the journal now is
    shipped. After that, a failing sink is retried for `patience` seconds. With `hurry`, which is for a
    user who waits, the sink may use more than its share of a core.
    """
    goal = feed.end(directory.journal) if once else None
    with contextlib.closing(Hold(directory, name)) as hold:
        return hold.ship(Task(directory, name, goal, patience, hurry))


class Hold:
    """A run's sink in this follower's hands: no other ships to it, and it stays open, until `close`."""

    def __init__(self, directory: RunDirectory, name: str) -> None:
        self._directory, self._name = directory, name
        self._lock: int | None = None
        self._shipper: Shipper | None = None

    @property
    def concluded(self) -> bool:
        """Whether the sink was told how the run ended."""
        return self._shipper is not None and self._shipper.concluded

    def ship(self, task: Task) -> bool:
        """Ship what the task says; returns whether all of it was shipped."""
        if self._lock is None:
            self._lock = task.take_turn()
            if self._lock is None:
                return task.complete()
        if self._shipper is None:
            file = ledger.file_of(self._directory, self._name)
            self._shipper = Shipper(self._directory, file, SINKS[self._name])
        return task.ship(self._shipper)

    def close(self) -> None:
        """Close the sink, and leave it to other followers."""
        shipper, self._shipper = self._shipper, None
        lock, self._lock = self._lock, None
        if shipper is not None:
            shipper.close()
        if lock is not None:
            os.close(lock)


@dataclass(frozen=True)
class _Outside:
    """The events that wake a follower."""

    trained: bool
    """Whether the trainer is alive."""
    asked: int
    """When another follower last asked for this sink, see `storage.modified`."""


class Task:
    """A follower's task: ship the journal up to `goal`, or to the end of the run.

    The goal is moved to the present end of the journal when the trainer is found to be gone.
    """

    def __init__(
        self,
        directory: RunDirectory,
        name: str,
        goal: Cursor | None,
        patience: float,
        hurry: bool = False,
        failures: int = 0,
    ) -> None:
        self._directory = directory
        self._failures = failures
        self._goal = goal
        self._patience = patience
        self._hurry = hurry
        self._name = name
        self._lock_file = ledger.lock_of(directory, name)
        self._wake_file = self._lock_file.with_suffix(".wake")
        self._alone_since: float | None = None

    def take_turn(self) -> int | None:
        """Wait for another follower of this run to end; returns the lock, or None if it completed the task.

        Also returns None if the patience runs out first.
        """
        self._directory.sinks.mkdir(exist_ok=True)
        while (lock := storage.try_lock(self._lock_file)) is None:
            if self._goal is not None and self._alone_since is None:
                self._wake_file.touch()  # makes the other follower try now
            if self.complete() or self._out_of_patience():
                return None
            time.sleep(0.1)
        return lock

    def complete(self) -> bool:
        """Whether the sink has received everything it should have by now."""
        return is_complete(self._directory, self._name, self._goal)

    def ship(self, shipper: Shipper) -> bool:
        """Ship until complete; returns False if the patience ran out first, or the run was removed."""
        failures, alive = self._failures, True
        while self._directory.exists():
            before = self._outside()  # checked first: a trainer that is gone logs nothing more
            try:
                if self._goal is not None and alive and not before.trained:
                    self._goal = feed.end(self._directory.journal)
                alive = before.trained
                began = time.thread_time()
                if shipper.ship_next(self._goal):
                    failures = 0
                    if alive and not self._hurry:
                        self._sleep((time.thread_time() - began) * (1 / SHARE - 1), before)
                    continue
                alive = alive or self._directory.trained_here  # again, if the run was resumed meanwhile
                if not alive:
                    shipper.conclude()
                if not alive or self._goal is not None:
                    return True
                failures = 0
            except Exception as error:
                failures += 1
                gives_up = self._out_of_patience()
                shipper.failed(error, report=failures >= _REPORTED_AFTER or (gives_up and self._hurry))
                if gives_up:
                    return False
            self._sleep(pause(failures, alone=not alive), before)
        return False

    def _sleep(self, seconds: float, before: _Outside) -> None:
        """Sleep until another follower asks for the sink, the trainer's state changes, or time is up."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._outside() == before:
            time.sleep(min(left, INTERVAL))

    def _outside(self) -> _Outside:
        return _Outside(self._directory.trained_here, storage.modified(self._wake_file))

    def _out_of_patience(self) -> bool:
        """Whether the patience has passed since there was no trainer to wait for."""
        if self._goal is None and self._directory.trained_here:
            self._alone_since = None
            return False
        self._alone_since = self._alone_since or time.monotonic()
        return time.monotonic() - self._alone_since > self._patience


def pause(failures: int, *, alone: bool) -> float:
    """Seconds before another attempt after so many failures; fewer once there is no trainer to wait for."""
    return backoff(failures, INTERVAL, LONGEST_BACKOFF / 6 if alone else LONGEST_BACKOFF)


def is_complete(directory: RunDirectory, name: str, goal: Cursor | None) -> bool:
    """Whether a sink has received the journal up to the goal; without one, all of a run that has ended."""
    known = ledger.load(ledger.file_of(directory, name))
    if not known.concluded and (goal is None or not directory.trained_here):
        return False
    return feed.reached(known.cursor, feed.end(directory.journal) if goal is None else goal)


def _state(directory: RunDirectory, name: str) -> SinkState:
    known = ledger.load(ledger.file_of(directory, name))
    events = feed.pending(directory.journal, known.cursor)
    told = known.concluded or directory.trained_here
    return SinkState(
        name, known.where or WHERE[name](directory), events + (not told), known.error, known.since
    )


def follow_all(directory: RunDirectory, *, once: bool, patience: float, hurry: bool = False) -> bool:
    """Ship a run to all sinks in parallel, see `follow`; returns whether everything was shipped."""
    names = enabled()
    with ThreadPoolExecutor(max(len(names), 1)) as pool:
        shipping = [
            pool.submit(follow, directory, name, once=once, patience=patience, hurry=hurry) for name in names
        ]
    return all(shipped.result() for shipped in shipping)


def main() -> int:
    """The follower's process. Returns 0 if everything was shipped, else 1."""
    parser = argparse.ArgumentParser(prog="stoker.tracking.follower")
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--once", action="store_true", help="ship what is there now, then exit")
    arguments = parser.parse_args()
    os.nice(19)  # training comes first
    messages.write_to_stderr()
    directory, once = RunDirectory(arguments.run), arguments.once
    patience = ONCE_PATIENCE if once else PATIENCE
    return 0 if follow_all(directory, once=once, patience=patience, hurry=once) else 1


if __name__ == "__main__":
    sys.exit(main())
