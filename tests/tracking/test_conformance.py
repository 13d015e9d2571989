"""What every sink must do: a run of three attempts with two kills arrives as one run.

Real training processes, killed; real followers, killed too; MLflow as its own server over
HTTP on PostgreSQL, the other sinks as the files that they leave, read back.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, ledger, wandb_files
from synthetic_run import DEADLINE, Seen, Trainer, make_run, until

from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own

SCRIPT = Path(__file__).with_name("digits_run.py")
MEDIA = [
    ("figures/answers", 7), ("histograms/weights", 7), ("images/digit", 7), ("tables/answers", 7),
    ("texts/sample", 7),
]  # fmt: skip


class Reader(Protocol):
    """A sink's content, read with the sink's own tools, after the fact."""

    def runs(self) -> int: ...
    def replaced(self) -> int: ...
    def metrics(self) -> set[str]: ...
    def points(self, metric: str) -> list[tuple[int, float]]: ...
    def params(self) -> dict[str, str]: ...
    def tags(self) -> dict[str, str]: ...
    def notes(self) -> str: ...
    def has_artifact(self) -> bool: ...
    def table(self) -> list[list[Any]]: ...
    def media(self) -> list[tuple[str, int]]: ...
    def status(self) -> str: ...


class MlflowReader:
    """MLflow's own client, over HTTP."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._experiment = experiment

    @property
    def _seen(self) -> Seen:
        return Seen(self._uri, self._experiment)

    def runs(self) -> int:
        return len(self._seen.runs)

    def replaced(self) -> int:
        seen = self._seen
        return sum(run.data.tags.get("stoker.replaced_by") == seen.run.info.run_id for run in seen.runs)

    def metrics(self) -> set[str]:
        return set(self._seen.run.data.metrics)

    def points(self, metric: str) -> list[tuple[int, float]]:
        return self._seen.points(metric)

    def params(self) -> dict[str, str]:
        return dict(self._seen.run.data.params)

    def tags(self) -> dict[str, str]:
        return dict(self._seen.run.data.tags)

    def notes(self) -> str:
        return str(self._seen.run.data.tags["mlflow.note.content"])

    def has_artifact(self) -> bool:
        return self._seen.artifacts("weights") == ["weights/deep.bin"]

    def table(self) -> list[list[Any]]:
        seen = self._seen
        file = seen.client.download_artifacts(seen.run.info.run_id, "tables/answers/step-00000007.json")
        return [list(row) for row in json.loads(Path(file).read_text())["data"]]

    def media(self) -> list[tuple[str, int]]:
        seen = self._seen
        kinds = {kind.partition("/")[0] for kind, _ in MEDIA} & set(seen.artifacts())
        files = [file for kind in kinds for name in seen.artifacts(kind) for file in seen.artifacts(name)]
        steps = {file.partition(".")[0].rpartition("/step-")[::2] for file in files}
        return sorted((name, int(step)) for name, step in steps)

    def status(self) -> str:
        return {"FINISHED": "finished", "KILLED": "killed", "RUNNING": "running"}[self._seen.status]


class TensorBoardReader:
    """TensorBoard's own reader of event files."""

    def __init__(self, run: RunDirectory) -> None:
        self._folder = run.path / "tensorboard"

    def _events(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self._folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        return events

    def _texts(self, tag: str) -> list[str]:
        events = self._events()
        if tag not in events.Tags()["tensors"]:
            return []
        return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]

    def runs(self) -> int:
        return self._folder.is_dir() + self.replaced()

    def replaced(self) -> int:
        return len([*self._folder.parent.glob("tensorboard.replaced_by.*")])

    def metrics(self) -> set[str]:
        return set(self._events().Tags()["scalars"])

    def points(self, metric: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self._events().Scalars(metric)]

    def params(self) -> dict[str, str]:
        (config,) = self._texts("stoker/config")
        rows = [line.strip("|").split("|") for line in config.splitlines()[2:]]
        found = dict(rows)
        return {**found, "parameters": self._texts("stoker/params/parameters")[0]}

    def tags(self) -> dict[str, str]:
        return {"team": self._texts("stoker/tags/team")[-1]}

    def notes(self) -> str:
        return self._texts("stoker/notes")[-1]

    def has_artifact(self) -> bool:
        return "artifacts/weights/deep.bin" in self._texts("stoker/artifacts/weights")[-1]

    def table(self) -> list[list[Any]]:
        (shown,) = self._texts("tables/answers")
        rows = [line.strip("|").split("|") for line in shown.strip().splitlines()[2:]]
        return [[None if cell == "null" else cell for cell in row[:1]] + [float(row[1])] for row in rows]

    def media(self) -> list[tuple[str, int]]:
        events = self._events()
        read = {"images": events.Images, "histograms": events.Histograms, "tensors": events.Tensors}
        tags = [(tag, of) for kind, of in read.items() for tag in events.Tags()[kind]]
        return sorted(
            (tag, event.step) for tag, of in tags if not tag.startswith(("stoker/", "_")) for event in of(tag)
        )

    def status(self) -> str:
        said = self._texts("stoker/status")
        return said[-1] if said else "running"


class WandbReader:
    """The files of the offline run, read back."""

    def __init__(self, run: RunDirectory) -> None:
        self._directory = run

    def _files(self) -> list[Path]:
        return wandb_files.of_run(self._directory.path, self._standing())

    def _standing(self) -> str:
        """The id of the run that the last rebuild made."""
        return ledger.load(ledger.file_of(self._directory, "wandb")).run or ""

    def _rows(self) -> list[dict[str, Any]]:
        return [row for file in self._files() for row in wandb_files.history(file)]

    def _config(self, files: list[Path] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for file in files or self._files():
            for record in wandb_files.records(file):
                kind = record.WhichOneof("record_type")
                updates = record.run.config.update if kind == "run" else record.config.update
                config.update({u.key: json.loads(u.value_json) for u in updates if u.key})
        return config

    def _media(self, name: str) -> dict[str, Any]:
        (found,) = [row[name] for row in self._rows() if name in row]
        return dict(found)

    def runs(self) -> int:
        return len({file.name for file in self._directory.path.glob("wandb/offline-run-*/*.wandb")})

    def replaced(self) -> int:
        files = self._directory.path.glob("wandb/offline-run-*/*.wandb")
        return sum(self._config([file])["stoker"].get("replaced_by") == self._standing() for file in files)

    def metrics(self) -> set[str]:
        return {key for row in self._rows() for key in row}

    def points(self, metric: str) -> list[tuple[int, float]]:
        step = "system/sample" if metric.startswith("system/") else "step"
        return sorted((row[step], float(row[metric])) for row in self._rows() if metric in row)

    def params(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._config().items()}

    def tags(self) -> dict[str, str]:
        return dict(self._config()["tags"])

    def notes(self) -> str:
        records = [record for file in self._files() for record in wandb_files.records(file)]
        said = [record.run.notes for record in records if record.WhichOneof("record_type") == "run"]
        return str([notes for notes in said if notes][-1])

    def has_artifact(self) -> bool:
        names = {
            entry.path
            for file in self._files()
            for record in wandb_files.records(file)
            if record.WhichOneof("record_type") == "request" or record.WhichOneof("record_type") == "artifact"
            for entry in (record.artifact or record.request.log_artifact.artifact).manifest.contents
        }
        return "deep.bin" in names

    def table(self) -> list[list[Any]]:
        path = self._media("tables/answers")["path"]
        (file,) = self._directory.path.glob(f"wandb/offline-run-*/files/{path}")
        return [list(row) for row in json.loads(file.read_text())["data"]]

    def media(self) -> list[tuple[str, int]]:
        return sorted((key, row["step"]) for row in self._rows() for key in row if isinstance(row[key], dict))

    def status(self) -> str:
        exits, said = [], "running"
        for file in self._files():
            ended = False
            for record in wandb_files.records(file):
                kind = record.WhichOneof("record_type")
                if kind == "summary":
                    for item in record.summary.update:
                        if (item.key or "/".join(item.nested_key)) == "stoker/status":
                            said = json.loads(item.value_json)
                ended = ended or kind == "exit"
            exits.append(ended)
        return said if exits and exits[-1] else "running"


SINKS = ["mlflow", "wandb", "tensorboard"]


@pytest.fixture(params=SINKS)
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setenv("STOKER_SINKS", request.param)
    monkeypatch.setenv("EXPERIMENT", tmp_path.name)  # one MLflow server has the runs of all tests
    monkeypatch.chdir(tmp_path)
    if request.param == "mlflow":
        url = request.getfixturevalue("server")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        return MlflowReader(url, tmp_path.name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return WandbReader(_run(tmp_path)) if request.param == "wandb" else TensorBoardReader(_run(tmp_path))


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the script; returns once it has logged. Whatever still runs at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, cwd=tmp_path
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"logged\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    _kill_followers(tmp_path)


def _run(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "runs" / folder.name / "a")


def _followers(folder: Path) -> list[psutil.Process]:
    """The followers of the test's run, by their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "stoker.tracking.follower" in line and str(_run(folder).path) in line:
            found.append(process)
    return found


def _kill_followers(folder: Path) -> None:
    for one in _followers(folder):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            one.kill()


def _pending(folder: Path) -> int:
    return sum(state.pending for state in follower.state(_run(folder)))


def test_three_attempts_with_two_kills_arrive_as_one_run_and_so_does_what_is_said_of_it_later(
    tmp_path: Path, reader: Reader, train: Callable[..., subprocess.Popen[bytes]], stoker: Any
) -> None:
    """Each once, also a point, a table and a figure of one name at one step."""
    first = train("1", "40", "--samples", "1")
    until(lambda: _pending(tmp_path) == 0)
    assert reader.status() == "running"
    first.send_signal(signal.SIGKILL)
    until(lambda: reader.status() == "killed", every=0.3)

    second = train("31", "60", "--resume", "30", "--samples", "1")
    time.sleep(1.0)  # somewhere in its start, or in shipping
    _kill_followers(tmp_path)
    second.send_signal(signal.SIGKILL)
    second.wait()

    third = train("56", "70", "--resume", "55", "--finish", "--pause", "0.1")  # the machine shows in a second
    assert third.wait(DEADLINE) == 0
    until(lambda: _pending(tmp_path) == 0)
    until(lambda: not _followers(tmp_path), every=0.3)

    assert reader.runs() == 1
    of_attempt = {s: 1 if s <= 40 else 2 if s <= 60 else 3 for s in range(1, 71)}
    assert reader.points("loss") == [(s, 1000 * n + s) for s, n in of_attempt.items()]
    assert [s for s, _ in reader.points("val/accuracy")] == list(range(1, 71))
    odd = dict(reader.points("odd"))
    assert math.isnan(odd[2])
    assert odd[3] > 1e300  # SQL databases know no infinity: MLflow stores the largest number
    assert len(reader.points("odd")) == 70
    samples = [s for s, _ in reader.points("system/memory_percent")]
    assert samples == list(range(len(samples)))
    assert samples
    assert reader.metrics() >= {"loss", "odd", "val/accuracy", "system/cpu_percent"}
    assert reader.params()["lr"] == "0.1"
    assert reader.params()["parameters"] == "1234"
    assert reader.tags()["team"] == "blue"
    assert reader.notes() == "a note\n\nof two paragraphs\n\nanother"
    assert reader.has_artifact()
    assert reader.table() == [["why", 0.5], [None, 1.0]]
    assert reader.points("answers") == [(7, 0.5)]
    assert reader.media() == MEDIA
    assert reader.status() == "finished"

    before = reader.points("loss")
    assert stoker("runs", "tag", "a", "team=red").code == 0
    until(lambda: _pending(tmp_path) == 0)
    assert reader.tags()["team"] == "red"
    assert reader.points("loss") == before
    assert reader.status() == "finished"


@pytest.mark.soak
@pytest.mark.parametrize("reader", SINKS if SOAK else ["mlflow"], indirect=True)
def test_a_run_that_is_rebuilt_has_what_the_view_has_and_the_old_one_is_marked(
    tmp_path: Path, reader: Reader, train: Callable[..., subprocess.Popen[bytes]], stoker: Any
) -> None:
    first = train("1", "40")
    refused = stoker("sync", "a", "--rebuild")
    assert refused.code == 2
    assert "is being trained now" in refused.err
    until(lambda: _pending(tmp_path) == 0)
    first.kill()
    train("31", "50", "--resume", "30", "--finish").wait(DEADLINE)
    until(lambda: _pending(tmp_path) == 0)
    until(lambda: not _followers(tmp_path), every=0.3)
    assert reader.points("loss")[39] == (40, 1040)

    (said,) = stoker("sync", "a", "--rebuild", "--json").answer["sinks"]
    assert said["rebuilt"]
    assert said["replaced"]
    assert (reader.runs(), reader.replaced()) == (2, 1)
    of_attempt = {s: 1 if s <= 30 else 2 for s in range(1, 51)}
    assert reader.points("loss") == [(s, 1000 * n + s) for s, n in of_attempt.items()]
    assert (reader.params()["lr"], reader.params()["parameters"]) == ("0.1", "1234")
    assert reader.tags()["team"] == "blue"
    assert reader.has_artifact()
    assert reader.table() == [["why", 0.5], [None, 1.0]]
    assert reader.status() == "finished"

    train("41", "60", "--resume", "40", "--finish").wait(DEADLINE)  # it goes on in the new one
    until(lambda: _pending(tmp_path) == 0)
    until(lambda: not _followers(tmp_path), every=0.3)
    assert (reader.runs(), reader.replaced()) == (2, 1)
    assert [s for s, _ in reader.points("loss")] == list(range(1, 61))
    assert (dict(reader.points("loss"))[50], dict(reader.points("loss"))[60]) == (2050, 3060)
    assert reader.status() == "finished"
    assert "created anew, replacing" in stoker("sync", "a", "--rebuild").out
    assert dict(reader.points("loss"))[50] == 3050


@pytest.mark.soak(small=False)
@pytest.mark.parametrize("whole_experiment", [False, True])
def test_what_was_deleted_in_mlflow_is_made_anew(
    tmp_path: Path,
    server: str,
    stoker: Any,
    monkeypatch: pytest.MonkeyPatch,
    whole_experiment: bool,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    experiment = f"deleted-{whole_experiment}"
    runs = [_ended_run(tmp_path / "runs", experiment, name) for name in ("a", "b")]
    assert stoker("sync", "a").code == 0
    before = Seen(server, experiment)
    if whole_experiment:
        before.client.delete_experiment(before.run.info.experiment_id)
    else:
        before.client.delete_run(before.run.info.run_id)
    Trainer(runs[0]).end("stopped")
    for name in ("a", "b") if whole_experiment else ("a",):
        stuck = stoker("sync", name)
        assert stuck.code == 1
        assert f"stoker sync {experiment}/{name} --rebuild" in stuck.err
        assert f"experiment {experiment!r} was deleted" in stuck.err or not whole_experiment
    for name in ("a", "b"):
        assert stoker("sync", name, "--rebuild").code == 0
    seen = Seen(server, experiment)
    standing = [run for run in seen.runs if "stoker.replaced_by" not in run.data.tags]
    assert sorted(run.data.tags["mlflow.runName"] for run in standing) == ["a", "b"]
    assert before.run.info.run_id not in {run.info.run_id for run in standing}
    assert all(run.data.metrics == {"loss": 1.0} for run in standing)


def _ended_run(runs: Path, experiment: str, name: str) -> RunDirectory:
    run = make_run(runs, name, experiment=experiment)
    trainer = Trainer(run)
    trainer.log(1, loss=1.0)
    trainer.end("finished")
    return run
