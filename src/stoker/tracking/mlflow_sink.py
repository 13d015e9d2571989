"""MLflow as a sink: one MLflow run over all attempts of a run.

By default on a SQLite file beside the runs; MLFLOW_TRACKING_URI names a server instead, and
changes nothing else. MLflow keeps one of two points with the same key, time, step and value,
so sending a batch again is harmless.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker import storage
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.run.journal import Event
from stoker.tracking.sink import Point

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds; the follower tries again by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

_STATUS = {view.RUNNING: "RUNNING", view.FINISHED: "FINISHED", view.FAILED: "FAILED"}
_METRICS, _PARAMS = 1000, 100  # at most, in a request
_LARGEST_COPY = 512 * 2**20  # bytes of an artifact that is still copied


class MLflowSink:
    """Ships one run to MLflow."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._runs = directory.path.parent.parent
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded_store(self._runs)
        self._client: MlflowClient | None = None
        self._run_id = ""

    def open(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Find the run by what is known, else by its tag, else make it."""
        with storage.locked(self._runs / ".mlflow.lock"):  # two followers must not both make the tables
            self._client = MlflowClient(self.uri)
            experiment = self._experiment()
        if known.get("uri") == self.uri:
            self._run_id = str(known["run_id"])
            self._client.get_run(self._run_id)
        else:
            self._run_id = self._find(experiment) or self._make(experiment)
        where = f"{self.uri} experiment {self._directory.experiment} run {self._run_id}"
        return {"uri": self.uri, "run_id": self._run_id, "where": where}

    def send(self, points: Sequence[Point]) -> None:
        """Log points in batches, each with the time at which it was logged to the journal."""
        metrics = [Metric(_name(p.metric), p.value, int(p.time * 1000), p.step) for p in points]
        for start in range(0, len(metrics), _METRICS):
            self._connected.log_batch(self._run_id, metrics=metrics[start : start + _METRICS])

    def record(self, event: Event) -> None:
        """Tags become tags, artifacts artifacts, tables JSON under `tables/`."""
        if event["type"] == "tags":
            self._tag(event["tags"])
        elif event["type"] == "table":
            content = {"columns": event["columns"], "data": event["rows"]}
            self._connected.log_dict(self._run_id, content, f"tables/{event['name']}-{event['step']}.json")
        else:
            self._copy(event)

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED; KILLED for all else: preempted, interrupted, gone."""
        self._connected.update_run(self._run_id, status=_STATUS.get(status, "KILLED"))

    @property
    def _connected(self) -> MlflowClient:
        assert self._client is not None, "open() comes first"
        return self._client

    def _experiment(self) -> Experiment:
        name = self._directory.experiment
        location = (self._runs / "mlartifacts" / name).as_uri() if self.uri.startswith("sqlite:") else None
        found = self._connected.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # another run of the experiment was first
                self._connected.create_experiment(name, artifact_location=location)
            found = self._connected.get_experiment_by_name(name)
        assert found is not None
        return found

    def _find(self, experiment: Experiment) -> str | None:
        """The run that an earlier follower made, and died before it could write that down."""
        token = self._token(self._directory.record())
        found = self._connected.search_runs([experiment.experiment_id], f"tags.`stoker.run` = '{token}'")
        return str(found[0].info.run_id) if found else None

    def _make(self, experiment: Experiment) -> str:
        record = self._directory.record()
        code = record.get("code") or {}
        tags = {
            "stoker.run": self._token(record),
            "stoker.path": str(self._directory.path),
            "mlflow.runName": self._directory.id,
            "mlflow.source.name": str(record.get("recipe", {}).get("reference", "")),
            "mlflow.source.git.commit": str(code.get("commit", "")),
        }
        made = self._connected.create_run(
            experiment.experiment_id, tags={key: value for key, value in tags.items() if value}
        )
        run_id = str(made.info.run_id)
        params = [Param(_name(k), str(v)[:MAX_PARAM_VAL_LENGTH]) for k, v in record["config"].items()]
        for start in range(0, len(params), _PARAMS):
            self._connected.log_batch(run_id, params=params[start : start + _PARAMS])
        return run_id

    def _token(self, record: Mapping[str, Any]) -> str:
        return f"{self._directory.experiment}/{self._directory.id}@{record.get('uid', '')}"

    def _tag(self, tags: Mapping[str, str]) -> None:
        known = [RunTag(_name(key), value[:MAX_TAG_VAL_LENGTH]) for key, value in tags.items()]
        for start in range(0, len(known), _PARAMS):
            self._connected.log_batch(self._run_id, tags=known[start : start + _PARAMS])

    def _copy(self, event: Event) -> None:
        """Copy an artifact's files; a large one is only named."""
        if sum(file["size"] for file in event["files"]) > _LARGEST_COPY:
            self._tag({f"stoker.artifact.{event['name']}": str(self._directory.path)})
            return
        for file in event["files"]:
            path = Path(file["path"])
            if not (self._directory.path / path).is_file():
                continue  # it was deleted since; its checksum stands in the journal
            inside = path.parent.relative_to("artifacts") if path.parts[0] == "artifacts" else path.parent
            target = None if inside == Path() else inside.as_posix()
            self._connected.log_artifact(self._run_id, str(self._directory.path / path), target)


def embedded_store(runs: Path) -> str:
    """The URI of the store that stands beside the runs."""
    return f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def _name(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-. /:]", "_", name)
