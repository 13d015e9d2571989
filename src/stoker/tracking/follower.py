"""The follower: a separate process that ships a run's journal to the sinks.

Training starts it and does not wait for it. Twice a second it reads the part of the journal past its
ledger; it ends when the trainer is gone and everything is shipped. It can be killed at any moment:
the next one resumes, and whatever it sends again, a sink stores once. A failing sink is retried with
increasing delays, and training never notices.

    python -m stoker.tracking.follower [--once] RUN_DIRECTORY

One process ships all trials of a search, as long as the search runs:

    python -m stoker.tracking.follower --sweep FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stoker import signals, storage
from stoker.errors import BadInput, nearest
from stoker.periodic import backoff
from stoker.run import journal, messages
from stoker.run.directory import SWEEP_LOCK, RunDirectory
from stoker.run.journal import Cursor
from stoker.tracking import feed, ledger, store
from stoker.tracking.ledger import Ledger
from stoker.tracking.shipper import Shipper
from stoker.tracking.sink import Sink

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between looks at the journal
LONGEST_BACKOFF = 30.0  # most seconds between attempts of a failing sink during training
SHARE = 0.1  # of a core that a sink may use during training; the rest waits
PATIENCE = 60.0  # seconds for which a failing sink is retried once the trainer is gone
ONCE_PATIENCE = 10.0  # the same for `stoker sync`, where a user waits
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


_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


def enabled() -> tuple[str, ...]:
    """The sinks named in STOKER_SINKS: `mlflow` by default, no sinks for `none`; not W&B if it is disabled.

    Raises BadInput for a sink that is unknown or not installed.
    """
    names = named()
    for name in names:
        check(name)
    return tuple(name for name in names if name != "wandb" or _disabling_wandb() is None)


def say_what_is_disabled() -> None:
    """Say so if a sink that STOKER_SINKS names is disabled."""
    setting = _disabling_wandb()
    if setting is not None and "wandb" in named():
        log.warning("%s: nothing goes to W&B; `stoker sync` without it ships the run later", setting)


def _disabling_wandb() -> str | None:
    """The environment's setting that disables W&B, if there is one."""
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":
        return "WANDB_MODE=disabled"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    return None


def named() -> tuple[str, ...]:
    """Like `enabled`, without checking that the sinks exist."""
    names = (name.strip() for name in os.environ.get("STOKER_SINKS", "mlflow").split(","))
    return tuple(dict.fromkeys(name for name in names if name not in ("none", "")))


def check(name: str) -> None:
    """Raises BadInput for a sink that is unknown or not installed."""
    if name not in _SINKS:
        hint = nearest(name, _SINKS)
        raise BadInput(f"STOKER_SINKS names {name!r}{hint}; use {', '.join(_SINKS)}, or none")
    if importlib.util.find_spec(name) is None:
        raise BadInput(f"STOKER_SINKS names {name}, which is not installed: pip install 'stoker[{name}]'")
    asked = os.environ.get("WANDB_MODE", "")
    if name == "wandb" and asked and asked.lower() not in _WANDB_MODES:
        raise BadInput(f"WANDB_MODE={asked}{nearest(asked, _WANDB_MODES)}; use {', '.join(_WANDB_MODES)}")


def spawn(directory: RunDirectory, once: bool = False) -> subprocess.Popen[bytes]:
    """Start a follower of a run; with `once` it ships what is there now and then exits."""
    return _spawn(directory.path, directory.logs, *(["--once"] if once else []))


def spawn_for_sweep(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that ships the trials of a search."""
    return _spawn(folder, folder, "--sweep")


def _spawn(folder: Path, logs: Path, *flags: str) -> subprocess.Popen[bytes]:
    log = logs / "follower.log"
    return signals.start_service("stoker.tracking.follower", *flags, str(folder.absolute()), log=log)


def state(directory: RunDirectory) -> list[SinkState]:
    """The progress of every sink of a run. Imports no sink."""
    return [_state(directory, name) for name in enabled()]


def failing(directory: RunDirectory) -> dict[str, str]:
    """The sinks of a run that are failing at the moment, each with the reason."""
    found = {name: ledger.load(ledger.file_of(directory, name)).error for name in enabled()}
    return {name: error for name, error in found.items() if error is not None}


def failing_in(folder: Path) -> dict[str, str]:
    """Like `failing`, for any trial of a search."""
    found: dict[str, str] = {}
    for run in _runs(folder):
        found |= failing(run)
    return found


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
    with contextlib.closing(_Hold(directory, name)) as hold:
        return hold.ship(_Task(directory, name, goal, patience, hurry))


class _Hold:
    """A run's sink in this follower's hands: no other ships to it, and it stays open, until `close`."""

    def __init__(self, directory: RunDirectory, name: str) -> None:
        self._directory, self._name = directory, name
        self._lock: int | None = None
        self._shipper: Shipper | None = None

    @property
    def concluded(self) -> bool:
        """Whether the sink was told how the run ended."""
        return self._shipper is not None and self._shipper.concluded

    def ship(self, task: _Task) -> bool:
        """Ship what the task says; returns whether all of it was shipped."""
        if self._lock is None:
            self._lock = task.take_turn()
            if self._lock is None:
                return task.complete()
        if self._shipper is None:
            file = ledger.file_of(self._directory, self._name)
            self._shipper = Shipper(self._directory, file, _SINKS[self._name])
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


class _Task:
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
        self._file = ledger.file_of(directory, name)
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
        known = ledger.load(self._file)
        if not known.concluded and (self._goal is None or not self._directory.trained_here):
            return False
        goal = feed.end(self._directory.journal) if self._goal is None else self._goal
        return feed.reached(known.cursor, goal)

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
            self._sleep(_backoff(failures, alone=not alive), before)
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


def _backoff(failures: int, *, alone: bool) -> float:
    """Seconds before another attempt after so many failures; fewer once there is no trainer to wait for."""
    return backoff(failures, INTERVAL, LONGEST_BACKOFF / 6 if alone else LONGEST_BACKOFF)


def _state(directory: RunDirectory, name: str) -> SinkState:
    known = ledger.load(ledger.file_of(directory, name))
    events = feed.pending(directory.journal, known.cursor)
    told = known.concluded or directory.trained_here
    return SinkState(
        name, known.where or _WHERE[name](directory), events + (not told), known.error, known.since
    )


def _mlflow(directory: RunDirectory) -> Sink:
    for name, value in {**store.QUIET, **store.IMPATIENT}.items():
        os.environ.setdefault(name, value)
    from stoker.tracking.mlflow_sink import MlflowSink

    return MlflowSink(directory)


def _wandb(directory: RunDirectory) -> Sink:
    from stoker.tracking.wandb_sink import WandbSink

    return WandbSink(directory)


def _tensorboard(directory: RunDirectory) -> Sink:
    from stoker.tracking.tensorboard_sink import TensorBoardSink

    return TensorBoardSink(directory)


def _tracking_store(directory: RunDirectory) -> str:
    runs = directory.runs
    return store.without_credentials(store.server_uri() or store.embedded_uri(runs))


_SINKS: dict[str, Callable[[RunDirectory], Sink]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
_WHERE: dict[str, Callable[[RunDirectory], str]] = {
    "mlflow": _tracking_store,
    "wandb": lambda directory: str(directory.path / "wandb"),
    "tensorboard": lambda directory: str(directory.path / "tensorboard"),
}


def follow_all(directory: RunDirectory, *, once: bool, patience: float, hurry: bool = False) -> bool:
    """Ship a run to all sinks in parallel, see `follow`; returns whether everything was shipped."""
    names = enabled()
    with ThreadPoolExecutor(max(len(names), 1)) as pool:
        shipping = [
            pool.submit(follow, directory, name, once=once, patience=patience, hurry=hurry) for name in names
        ]
    return all(shipped.result() for shipped in shipping)


def follow_sweep(folder: Path, patience: float = PATIENCE) -> bool:
    """Ship the trials of a search one by one until it is over; returns whether everything was shipped.

    Each is shipped as far as it is when its turn comes, so that none waits for the end of another. One of
    which a sink fails has its turn with increasing delays; after the search, for `patience` seconds.
    """
    over_since: float | None = None
    untold = 0  # times that the end of the search could not be told
    turns: dict[tuple[str, str], _Turns] = {}
    with contextlib.ExitStack() as held:
        while True:
            over = not storage.is_locked(folder / SWEEP_LOCK)  # checked first: nothing is added after its end
            runs = _runs(folder)
            training = any(run.trained_here for run in runs)  # checked before what they logged
            behind = [run for run in runs if _is_behind(run)]
            for gone in [turn for turn in turns if turn[0] not in {run.id for run in runs}]:
                turns.pop(gone).close()  # another run may get its name
            for run in behind:
                for name in enabled():
                    if (run.id, name) not in turns:
                        turns[run.id, name] = held.enter_context(contextlib.closing(_Turns(run, name)))
                due = [turns[run.id, name] for name in enabled()]
                _ship_trial([turn for turn in due if turn.due(alone=over)])
            if over and not training and not behind:
                if _end_sweep(folder):
                    return True
                untold += 1
            else:
                untold = 0
            over_since = (over_since or time.monotonic()) if over else None
            if over_since is not None and time.monotonic() - over_since > patience:
                _end_sweep(folder)  # the sink that fails may be another
                return False
            time.sleep(_backoff(untold, alone=True))


class _Turns:
    """A trial's turns of being shipped to a sink.

    The sink stays open from one to the next while the trial lives: to open it again can take seconds, and
    W&B makes another folder of files each time.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        self.run, self._name = run, name
        self._hold = _Hold(run, name)
        self._failures = 0  # in a row
        self._newest = 0.0

    def due(self, *, alone: bool) -> bool:
        """Whether it is time for another; see `_backoff`."""
        waits = _backoff(self._failures, alone=alone) if self._failures else 0.0
        return time.monotonic() - self._newest >= waits

    def take(self) -> None:
        """Ship the trial as far as it is now."""
        shipped = False
        try:
            goal = feed.end(self.run.journal)
            shipped = self._hold.ship(_Task(self.run, self._name, goal, 0.0, failures=self._failures))
        finally:
            if not shipped or self._hold.concluded:
                self.close()
            self._failures = 0 if shipped else self._failures + 1
            self._newest = time.monotonic()

    def close(self) -> None:
        """Close the sink."""
        self._hold.close()


def _runs(folder: Path) -> list[RunDirectory]:
    found = (RunDirectory(file.parent) for file in sorted(folder.glob("*/run.json")))
    return [run for run in found if run.exists()]


def _is_behind(run: RunDirectory) -> bool:
    """Whether a sink lacks something of a trial as it is now; not if it was removed."""
    try:
        now = feed.end(run.journal)
        return not all(_Task(run, name, now, 0.0).complete() for name in enabled())
    except OSError:
        return run.exists()


def _ship_trial(due: Sequence[_Turns]) -> None:
    """Ship a trial as far as it is now to the sinks whose turn it is. An error is logged.

    A trial that failed before its first metric is removed, which can happen at any moment in here.
    """
    with ThreadPoolExecutor(max(len(due), 1)) as pool:
        shipping = [(turn.run, pool.submit(turn.take)) for turn in due]
    for run, shipped in shipping:
        error = shipped.exception()
        if error is not None and run.exists():
            log.warning("%s: %s: %s", run.id, type(error).__name__, error)


def _end_sweep(folder: Path) -> bool:
    """Tell MLflow that a search is over for now; returns whether it could be told."""
    if "mlflow" in enabled() and (runs := _runs(folder)):
        from stoker.tracking.mlflow_sink import MlflowSink

        try:
            MlflowSink(runs[0]).conclude_sweep()
        except Exception as error:  # whatever MLflow's client raises
            log.warning("the end of the search: %s: %s", type(error).__name__, error)
            return False
    return True


def main() -> int:
    """The follower's process. Returns 0 if everything was shipped, else 1."""
    parser = argparse.ArgumentParser(prog="stoker.tracking.follower")
    parser.add_argument("run", type=Path, help="the run's directory, or with --sweep that of a search")
    parser.add_argument("--sweep", action="store_true", help="ship all trials of a search until it is over")
    parser.add_argument("--once", action="store_true", help="ship what is there now, then exit")
    arguments = parser.parse_args()
    os.nice(19)  # training comes first
    messages.write_to_stderr()
    if arguments.sweep:
        return 0 if follow_sweep(arguments.run) else 1
    directory, once = RunDirectory(arguments.run), arguments.once
    patience = ONCE_PATIENCE if once else PATIENCE
    return 0 if follow_all(directory, once=once, patience=patience, hurry=once) else 1


if __name__ == "__main__":
    sys.exit(main())
