"""The follower of a search: one process ships all its trials, as long as the search runs.

    python -m stoker.tracking.sweep_follower FOLDER

See `follower.py`, which ships a single run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stoker import signals, storage
from stoker.run import messages
from stoker.run.directory import SWEEP_LOCK, RunDirectory
from stoker.tracking import feed
from stoker.tracking.follower import LOG, PATIENCE, Hold, Task, failing, is_complete, pause
from stoker.tracking.sinks import enabled

log = logging.getLogger(__name__)


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that ships the trials of a search."""
    return signals.start_service("stoker.tracking.sweep_follower", str(folder.absolute()), log=folder / LOG)


def failing_in(folder: Path) -> dict[str, str]:
    """The sinks that are failing for a trial of a search at the moment, each with the reason."""
    found: dict[str, str] = {}
    for run in _runs(folder):
        found |= failing(run)
    return found


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
            time.sleep(pause(untold, alone=True))


class _Turns:
    """A trial's turns of being shipped to a sink.

    The sink stays open from one to the next while the trial lives: to open it again can take seconds, and
    W&B makes another folder of files each time.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        self.run, self._name = run, name
        self._hold = Hold(run, name)
        self._failures = 0  # in a row
        self._newest = 0.0

    def due(self, *, alone: bool) -> bool:
        """Whether it is time for another; see `pause`."""
        waits = pause(self._failures, alone=alone) if self._failures else 0.0
        return time.monotonic() - self._newest >= waits

    def take(self) -> None:
        """Ship the trial as far as it is now."""
        shipped = False
        try:
            goal = feed.end(self.run.journal)
            shipped = self._hold.ship(Task(self.run, self._name, goal, 0.0, failures=self._failures))
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
        return not all(is_complete(run, name, now) for name in enabled())
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
    parser = argparse.ArgumentParser(prog="stoker.tracking.sweep_follower")
    parser.add_argument("folder", type=Path, help="the search's directory")
    arguments = parser.parse_args()
    os.nice(19)  # training comes first
    messages.write_to_stderr()
    return 0 if follow_sweep(arguments.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
