"""Synthetic runs for the follower, written through the journal as a trainer would."""

from __future__ import annotations

import functools
import os
import signal
import warnings
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

from stoker import storage
from stoker.run import journal, media
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, ledger
from stoker.tracking.shipper import Shipper
from stoker.tracking.sink import Batch, Ending, SinkRun

import support

T = TypeVar("T")

DEADLINE = support.LONG
until = functools.partial(support.until, every=0.1)


class Trainer:
    """Holds a run's lock and writes its journal, as a process that trains it does."""

    def __init__(self, directory: RunDirectory, drift: dict[str, Any] | None = None) -> None:
        lock = storage.try_lock(directory.lock_file)
        assert lock is not None
        self._lock = lock
        self.directory = directory
        self.number, self.journal = journal.start_attempt(directory.journal)
        self.journal.append("attempt_started", pid=os.getpid(), host="here", drift=drift or {})

    def log(self, step: int, **values: float) -> None:
        self.journal.append("metrics", step=step, values=journal.encode_values(values))

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        encoded = media.table(rows, None)
        file = media.write(self.directory, "table", name, step, encoded)
        self.journal.append("media", kind="table", name=name, step=step, file=file, about=encoded.about)

    def resume(self, step: int) -> None:
        self.journal.append("resumed", step=step, passed_over=[])

    def end(self, status: str) -> None:
        self.journal.append("attempt_ended", status=status, error=None)
        self.die()

    def die(self) -> None:
        """As after SIGKILL: the journal says nothing, the lock is free."""
        self.journal.close()
        os.close(self._lock)


class Seen:
    """A run as MLflow's own client reads it."""

    def __init__(self, uri: str, experiment: str = "digits") -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's own, at import
            from mlflow import MlflowClient
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(experiment)
        self.runs = self.client.search_runs([found.experiment_id]) if found else []

    @property
    def run(self) -> Any:
        """The one that stands: no rebuild has replaced it."""
        (run,) = (run for run in self.runs if "stoker.replaced_by" not in run.data.tags)
        return run

    @property
    def status(self) -> str:
        return str(self.run.info.status)

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point that MLflow holds, in the order of steps."""
        history = self.client.get_metric_history(self.run.info.run_id, metric)
        return sorted((point.step, point.value) for point in history)

    def artifacts(self, folder: str | None = None) -> list[str]:
        return sorted(file.path for file in self.client.list_artifacts(self.run.info.run_id, folder))


def make_run(runs: Path, name: str = "a", experiment: str = "digits", **config: Any) -> RunDirectory:
    directory = RunDirectory(runs / experiment / name)
    directory.create(
        {
            "uid": f"uid-of-{name}",
            "id": name,
            "experiment": experiment,
            "config": {"lr": 0.1, **config},
            "recipe": {"name": "cnn", "reference": "examples/own_loop.py"},
            "code": {"commit": "c0ffee", "branch": "main", "remote": None, "dirty": True},
        }
    )
    return directory


def run_follower(path: Path, environment: dict[str, str], patience: float) -> None:
    """What a follower's process does, for `forkserver`. Exits with 1 where it gave up."""
    os.environ.update(environment)
    if not follower.follow(RunDirectory(path), "mlflow", patience=patience):
        raise SystemExit(1)


def make_store(database: Path) -> None:
    """Make an embedded store as the first follower of a runs folder does."""
    from stoker.tracking import mlflow_sink

    mlflow_sink.make_store(database)


class DyingSink:
    """Is killed right after MLflow has stored what `word` says, before the ledger can know."""

    def __init__(self, directory: RunDirectory, word: str) -> None:
        from stoker.tracking.mlflow_sink import MlflowSink

        self._sink = MlflowSink(directory)
        self._word = word

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        return self._die_after("open", self._sink.open(known, started, mark, edition))

    def ship(self, batch: Batch) -> None:
        self._die_after("ship", self._sink.ship(batch))

    def conclude(self, ending: Ending) -> None:
        self._die_after("conclude", self._sink.conclude(ending))

    def close(self) -> None:
        self._sink.close()

    def _die_after(self, word: str, result: T) -> T:
        if word == self._word:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def run_dying_follower(path: Path, word: str) -> None:
    """Ship as a follower does, until `word` was done."""
    directory = RunDirectory(path)
    shipper = Shipper(directory, ledger.file_of(directory, "mlflow"), lambda run: DyingSink(run, word))
    while shipper.ship_next():
        pass
    shipper.conclude()


def train_until_killed(path: Path, steps: int, logged: Event) -> None:
    """A trainer's process: logs some steps, says so, and goes on for ever."""
    trainer = Trainer(RunDirectory(path))
    for step in range(1, steps + 1):
        trainer.log(step, loss=1 / step)
    logged.set()
    signal.pause()


def pending(directory: RunDirectory) -> int:
    return follower.state(directory)[0].pending
