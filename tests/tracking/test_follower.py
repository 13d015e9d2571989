from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND
from stoker import Run, storage
from stoker.errors import BadInput
from stoker.run import artifacts, journal, view
from stoker.run.directory import RunDirectory
from stoker.run.recorder import Recorder
from stoker.tracking import feed, follower, ledger, mlflow_sink, sinks, store
from stoker.tracking.shipper import Shipper
from stoker.tracking.sink import LARGEST_ARTIFACT, Batch, Ending, SinkRun
from stoker.world import World
from synthetic_run import DEADLINE, Trainer, make_run, pending, run_dying_follower, train_until_killed, until

import warm
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own


@pytest.mark.soak
def test_a_follower_killed_at_any_moment_ships_every_point_once(
    tmp_path: Path, follow: Any, finish: Any, seen: Any
) -> None:
    random = Random(0)
    run = make_run(tmp_path / "runs")
    trainer, step = Trainer(run), 0
    for kill in range(20 if SOAK else 5):
        before = _shipped(run)
        process = follow(run)
        for _ in range(1000):
            step += 1
            trainer.log(step, loss=1 / step, accuracy=step)
        if kill >= 2:  # the first are killed while they make the store, the others at work
            until(lambda before=before: _shipped(run) > before)
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.join()
    trainer.end("finished")
    finish(run)
    mlflow = seen(tmp_path / "runs")
    assert mlflow.points("loss") == [(s, 1 / s) for s in range(1, step + 1)]
    assert mlflow.points("accuracy") == [(s, s) for s in range(1, step + 1)]
    assert mlflow.status == "FINISHED"


def test_a_rank_that_outlives_its_attempt_changes_no_mean_of_the_next(tmp_path: Path) -> None:
    writers = {(a, rank): journal.join_attempt(tmp_path, a, rank) for a in (1, 2) for rank in (0, 1)}

    def log(attempt: int, rank: int, step: int, value: float) -> None:
        writers[attempt, rank].append("metrics", step=step, values={"accuracy": value}, reduce="mean")

    fed = feed.Feed(tmp_path, journal.Cursor())
    for attempt in (1, 2):
        writers[attempt, 0].append("attempt_started", pid=1, host="here", world=2)
    fed.take()
    log(1, 1, 2, 9.0)
    for rank in (0, 1):
        log(2, rank, 3, float(rank))
    assert [(point.step, point.value) for point in fed.take().points] == [(3, 0.5)]


def test_what_another_rank_than_the_first_logs_of_its_own_is_neither_written_nor_shipped(
    tmp_path: Path,
) -> None:
    writers = [journal.join_attempt(tmp_path, 1, rank) for rank in (0, 1)]
    recorders = [
        Recorder(writer, dataclasses.replace(World(), rank=rank, size=2), lambda: None)
        for rank, writer in enumerate(writers)
    ]
    recorders[0].event("attempt_started", pid=1, host="here", world=2)
    fed, shipped = feed.Feed(tmp_path, journal.Cursor()), []
    for step in (1, 2, 3):
        for rank in (1, 0):  # the other one is a moment earlier
            recorders[rank].log({"accuracy": 0.5}, step, "mean")
            recorders[rank].log({"loss": 100.0 * rank + step}, step)
            shipped += [(p.step, p.value) for p in fed.take().points if p.metric == "loss"]
    assert shipped == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert b"loss" not in writers[1].file.read_bytes()
    writers[1].append("metrics", step=4, values={"loss": 104.0})
    assert not fed.take().points


def test_what_mlflow_stored_just_before_a_kill_is_not_stored_twice(
    runs: Path, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    trainer = Trainer(run)
    for step in range(1, 1201):
        trainer.log(step, loss=1 / step, odd=math.nan)
    trainer.end("finished")
    for word in ("open", "ship", "ship", "conclude"):
        process = warm.process(run_dying_follower, run.path, word)
        process.start()
        process.join(DEADLINE)
        assert process.exitcode == -signal.SIGKILL
    finish(run)
    mlflow = seen(runs)
    assert mlflow.points("loss") == [(s, 1 / s) for s in range(1, 1201)]
    assert [s for s, _ in mlflow.points("odd")] == list(range(1, 1201))
    assert mlflow.status == "FINISHED"


def test_attempts_are_one_mlflow_run_in_which_the_first_point_of_a_step_stands(
    runs: Path, follow: Any, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    first = Trainer(run)
    for step in range(1, 51):
        first.log(step, loss=step)
    first.die()
    finish(run)
    assert seen(runs).status == "KILLED"

    second = Trainer(run, drift={"lr": [0.1, 0.2]})
    second.resume(30)
    for step in range(31, 61):
        second.log(step, loss=1000 + step)
    second.die()

    third = Trainer(run)
    third.resume(55)
    for step in range(56, 71):
        third.log(step, loss=2000 + step)
    process = follow(run)
    until(lambda: pending(run) == 0)
    mlflow = seen(runs)
    assert mlflow.status == "RUNNING"
    assert mlflow.run.data.tags["stoker.drift.lr"] == "0.1 -> 0.2"
    third.end("finished")
    process.join(DEADLINE)

    mlflow = seen(runs)
    assert mlflow.status == "FINISHED"
    values = {s: s if s <= 50 else 1000 + s if s <= 60 else 2000 + s for s in range(1, 71)}
    assert mlflow.points("loss") == list(values.items())


def test_everything_a_run_records_arrives_and_a_lost_ledger_changes_nothing(
    tmp_path: Path, finish: Any, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"key{i}": i for i in range(150)}
    run = make_run(tmp_path / "my runs", long="x" * 9000, found_out=None, **many)
    trainer = Trainer(run)
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0]):
        trainer.log(step, loss=value, **{"top-1 (%)": step, "top-1 [%]": -step})
    trainer.table("generations", 4, [{"prompt": "a"}, {"prompt": None}])
    trainer.journal.append("tags", tags={"fingerprint.data": "abc", "note": "y" * 9000})
    for text in ("z" * 5000, "two\n\nparagraphs", "the newest"):
        trainer.journal.append("note", text=text)
    trainer.journal.append("params", values={"lr": 0.2, "more": 1, "key3": 3, "found_out": 5})
    _write(run.artifacts / "adapter" / "deep" / "weights", b"123")
    _write(run.artifacts / "report.html", b"<html>")
    _write(run.artifacts / "big", b"")
    os.truncate(run.artifacts / "big", LARGEST_ARTIFACT + 1)
    for name in ("adapter", "report.html"):
        files = artifacts.describe(run, run.artifacts / name)
        trainer.journal.append("artifact", name=name, kind="file", path=f"artifacts/{name}", files=files)
    big = {"path": "artifacts/big", "size": (run.artifacts / "big").stat().st_size, "sha256": ""}
    gone = {"path": "artifacts/gone", "size": 1, "sha256": ""}
    for file in (big, gone):
        path = str(file["path"])
        trainer.journal.append("artifact", name=Path(path).name, kind="file", path=path, files=[file])
    trainer.end("failed")
    monkeypatch.chdir(tmp_path)

    for _ in range(2):
        finish(run)
        mlflow = seen(tmp_path / "my runs")
        data = mlflow.run.data
        assert data.params["lr"] == "0.1"
        assert data.tags["stoker.params.lr"] == "0.2", "a param of MLflow's is written once"
        assert data.params["more"] == "1"
        assert data.params["found_out"] == "5"
        assert len(data.params) == 154
        assert [name for name in data.tags if name.startswith("stoker.params.")] == ["stoker.params.lr"]
        assert data.params["long"] == "x" * 5999 + "…"
        assert data.tags["note"] == "y" * 4999 + "…"
        assert data.tags["fingerprint.data"] == "abc"
        notes = data.tags["mlflow.note.content"]
        assert notes.startswith("zzz")
        assert "z\n\n…\n\nz" in notes
        assert notes.endswith("z\n\ntwo\n\nparagraphs\n\nthe newest")
        assert len(notes) <= 5000
        assert data.tags["mlflow.source.git.commit"] == "c0ffee"
        assert data.tags["mlflow.source.name"] == "examples/own_loop.py"
        assert data.tags["mlflow.runName"] == "a"
        assert data.tags["stoker.path"] == str(run.path)
        assert data.tags["stoker.artifact.big"] == str(run.artifacts / "big")
        assert mlflow.status == "FAILED"
        assert [step for step, _ in mlflow.points("loss")] == [0, 1, 2, 3, 4]
        assert math.isnan(mlflow.points("loss")[1][1])
        assert sorted(data.metrics) == sorted(["loss", *map(mlflow_sink.key, ("top-1 (%)", "top-1 [%]"))])
        assert mlflow.artifacts() == ["adapter", "report.html", "tables"]
        assert mlflow.artifacts("adapter/deep") == ["adapter/deep/weights"]
        table = mlflow.client.download_artifacts(
            mlflow.run.info.run_id, "tables/generations/step-00000004.json"
        )
        assert orjson.loads(Path(table).read_bytes()) == {"columns": ["prompt"], "data": [["a"], [None]]}
        ledger.file_of(run, "mlflow").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my runs"]


def test_mlflow_says_why_a_run_ended_and_no_longer_once_it_goes_on(
    runs: Path, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    trainer = Trainer(run)
    trainer.journal.append("begun_from", step=7)
    trainer.journal.append("attempt_ended", status="failed", error="of rank 0")
    trainer.die()
    journal.note_failure(run.journal, trainer.number, "rank 1: " + "x" * 9000)
    finish(run)
    tags = seen(runs).run.data.tags
    assert tags["stoker.status"] == "failed"
    assert tags["stoker.error"] == "rank 1: " + "x" * 4991 + "…"
    assert tags["stoker.begun_from"] == "step 7 of another run's checkpoint"
    for status in ("preempted", "stopped"):
        Trainer(run).end(status)
        finish(run)
        mlflow = seen(runs)
        assert (mlflow.status, mlflow.run.data.tags["stoker.status"]) == ("KILLED", status)
        assert "stoker.error" not in mlflow.run.data.tags
    trainer = Trainer(run)
    trainer.die()
    journal.note_failure(run.journal, trainer.number, "rank 1: what it raised", raised=True)
    finish(run)
    assert (seen(runs).status, seen(runs).run.data.tags["stoker.status"]) == ("FAILED", "failed")
    Trainer(run).end("failed")
    journal.note_failure(run.journal, trainer.number + 1, "a machine is gone", status="preempted")
    finish(run)
    assert (seen(runs).status, seen(runs).run.data.tags["stoker.status"]) == ("KILLED", "preempted")


def test_mlflow_has_who_began_a_run_its_script_and_its_inputs_once(
    runs: Path, finish: Any, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    run = RunDirectory(runs / "digits" / "a")
    run.create({"uid": "a", "id": "a", "experiment": "digits", "config": {}, "command": ["train.py", "1"]})
    storage.write_json(
        run.provenance / "data.json", {"images": {"path": "/data", "fingerprint": f"sha256:{'c' * 64}"}}
    )
    files = [{"path": "weights", "size": 1, "sha256": "d" * 64}]
    for _ in range(2):
        trainer = Trainer(run)
        made_by = {"experiment": "llm", "id": "first", "uid": "b"}
        trainer.journal.append("used", name="model", run=made_by, files=files)
        trainer.journal.append("used", name="file", run=None, files=files)
        trainer.end("finished")
        finish(run)
        mlflow = seen(runs).run
        assert mlflow.info.user_id == mlflow.data.tags["mlflow.user"] == "ada"
        assert mlflow.data.tags["mlflow.source.name"] == "train.py"
        inputs = {one.dataset.name: one.dataset for one in mlflow.inputs.dataset_inputs}
        assert len(mlflow.inputs.dataset_inputs) == len(inputs) == 3
        assert inputs["images"].digest == "c" * 36
        assert {name: orjson.loads(one.source) for name, one in inputs.items()} == {
            "images": {"uri": "/data"}, "model": {"uri": "llm/first:model"}, "file": {"uri": "file"},
        }  # fmt: skip


def test_what_a_server_does_not_know_or_has_otherwise_keeps_nothing_else_back(
    runs: Path, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no inputs; the system does not know the user; an earlier version cut a param elsewhere."""

    def refuse(*_: Any) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    def unknown(*_: Any) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(mlflow_sink.MlflowClient, "log_inputs", refuse)
    monkeypatch.setattr(mlflow_sink.DefaultRunContext, "tags", unknown)
    run = RunDirectory(runs / "digits" / "a")
    run.create({"uid": "a", "id": "a", "experiment": "digits", "config": {"long": "x" * 7000}})
    trainer = Trainer(run)
    trainer.journal.append("used", name="file", run=None, files=[])
    for step in (1, 2):
        trainer.log(step, loss=float(step))
        with monkeypatch.context() as earlier:
            if step == 1:
                earlier.setattr(mlflow_sink, "_cut", lambda text, longest: text[:longest])
            assert follower.follow(run, "mlflow", once=True, patience=0.0)
    assert seen(runs).points("loss") == [(1, 1.0), (2, 2.0)]
    trainer.end("finished")


def test_a_killed_trainer_is_seen_and_the_follower_is_out_of_the_terminals_reach(
    runs: Path, spawn: Any, seen: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(runs)
    logged = warm.CONTEXT.Event()
    trainer = warm.process(train_until_killed, run.path, 5, logged)
    trainer.start()
    assert logged.wait(DEADLINE)
    process = spawn(run)
    assert os.getsid(process.pid) == process.pid
    until(lambda: pending(run) == 0)
    assert seen(runs).status == "RUNNING"
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    states = follower.wait(run, process, DEADLINE)
    assert process.returncode == 0
    assert [(s.name, s.pending, s.error) for s in states] == [("mlflow", 0, None)]
    assert seen(runs).status == "KILLED"
    assert "Traceback" not in (run.logs / "follower.log").read_text()
    assert "".join(capfd.readouterr()) == ""


def test_once_the_trainer_is_gone_nothing_is_put_off_for_its_sake(
    runs: Path, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended while a batch was shipped, for which the sink would pause now if it lived."""
    monkeypatch.setattr(follower, "SHARE", 1e-4)
    run = make_run(runs)
    trainer = Trainer(run)
    trainer.log(1, loss=1.0)

    class EndsMeanwhile(mlflow_sink.MlflowSink):
        def ship(self, batch: Any) -> None:
            super().ship(batch)
            if run.trained_here:
                trainer.end("finished")

    monkeypatch.setitem(sinks.SINKS, "mlflow", EndsMeanwhile)
    began = time.monotonic()
    assert follower.follow(run, "mlflow")
    assert time.monotonic() - began < DEADLINE, "not as long as a share of a core would take"
    assert seen(runs).status == "FINISHED"


def test_followers_of_several_runs_make_one_embedded_store_together(
    tmp_path: Path, follow: Any, seen: Any
) -> None:
    runs = [make_run(tmp_path / "runs", name) for name in ("a", "b", "c")]
    for run in runs:
        trainer = Trainer(run)
        for step in range(300):
            trainer.log(step, loss=step)
        trainer.end("finished")
    processes = [follow(run) for run in runs]
    for process in processes:
        process.join(DEADLINE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = seen(tmp_path / "runs").runs
    assert sorted(run.data.tags["mlflow.runName"] for run in found) == ["a", "b", "c"]
    assert {run.data.metrics["loss"] for run in found} == {299}


def test_a_second_follower_leaves_the_work_to_the_first(runs: Path, follow: Any, seen: Any) -> None:
    run = make_run(runs)
    trainer = Trainer(run)
    processes = [follow(run), follow(run)]
    for step in range(100):
        trainer.log(step, loss=step)
    trainer.end("finished")
    for process in processes:
        process.join(DEADLINE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen(runs).points("loss") == [(s, s) for s in range(100)]


def test_sinks_can_be_turned_off_and_an_unknown_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs")
    assert follower.state(run)[0].where == store.embedded_uri(tmp_path / "runs")
    monkeypatch.setenv("STOKER_SINKS", "none")
    assert sinks.enabled() == ()
    assert follower.state(run) == []
    monkeypatch.setenv("STOKER_SINKS", "mlfow")
    with pytest.raises(BadInput, match="did you mean 'mlflow'"):
        sinks.enabled()


def test_a_feed_that_begins_at_a_cursor_gives_the_batches_of_one_that_never_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    for attempt in range(3):
        trainer = Trainer(run)
        for step in range(attempt * 300, attempt * 300 + 700):
            trainer.log(step, loss=attempt)
        trainer.die()
        with trainer.journal.file.open("ab") as file:
            file.write(b'{"type": "metr')
    whole = feed.Feed(run.journal, feed.Cursor())
    taken = []
    while not feed.reached(whole.cursor, feed.end(run.journal)):
        resumed = feed.Feed(run.journal, whole.cursor)
        batch = whole.take()
        assert resumed.take() == batch
        taken += [(point.step, point.value) for point in batch.points]
    assert taken == [(s, 0 if s < 700 else 1 if s < 1000 else 2) for s in range(1300)]


def test_an_artifact_that_replaces_another_leaves_nothing_of_it_in_mlflow(
    runs: Path, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    _log_artifact(run, "other")
    finish(run)
    versions: list[dict[str, str]] = [
        {"w.bin": "1", "old": "1", "deep/shard-1": "1"},
        {"w.bin": "2", "shipped-by-a-killed-follower": "2"},
        {"w.bin": "3", "new": "3"},
    ]
    for number, contents in enumerate(versions):
        shutil.rmtree(run.artifacts / "model", ignore_errors=True)
        for name, text in contents.items():
            _write(run.artifacts / "model" / name, text.encode())
        _record_artifact(run, "model")
        if number == 1:
            process = warm.process(run_dying_follower, run.path, "ship")
            process.start()
            process.join(DEADLINE)
            assert process.exitcode == -signal.SIGKILL
            assert "model/shipped-by-a-killed-follower" in seen(runs).artifacts("model")
        else:
            finish(run)
    mlflow = seen(runs)
    assert mlflow.artifacts("model") == ["model/new", "model/w.bin"]
    assert Path(mlflow.client.download_artifacts(mlflow.run.info.run_id, "model/w.bin")).read_text() == "3"
    shutil.rmtree(run.artifacts / "model")
    _write(run.artifacts / "model", b"now a file")
    _record_artifact(run, "model")
    finish(run)
    assert mlflow.artifacts() == ["model", "other"]
    assert mlflow.artifacts("model") == []


@pytest.mark.parametrize("copied", [False, True])
def test_artifacts_stand_in_the_runs_folder_wherever_it_is_moved_to(
    runs: Path, finish: Any, seen: Any, copied: bool
) -> None:
    run = make_run(runs)
    _log_artifact(run, "one")
    finish(run)
    elsewhere = runs.parent / "other place" / "runs"
    elsewhere.parent.mkdir()
    (shutil.copytree if copied else shutil.move)(runs, elsewhere)
    before = _files(runs) if copied else []
    moved = RunDirectory(elsewhere / run.experiment / run.id)
    _log_artifact(moved, "two")
    finish(moved)
    mlflow = seen(elsewhere)
    assert mlflow.artifacts() == ["one", "two"]
    assert [file.name for file in _files(elsewhere) if file.is_file()] == ["one", "two"]
    assert (_files(runs) if runs.exists() else []) == before


@pytest.mark.parametrize("name", ["what?", "100%41", "a #&=+ä:@"])
def test_a_runs_folder_may_have_any_name(tmp_path: Path, finish: Any, seen: Any, name: str) -> None:
    runs = tmp_path / "parent" / name / "runs"
    run = make_run(runs)
    _log_artifact(run, "one")
    finish(run)
    assert seen(runs).artifacts() == ["one"]
    assert seen(runs).status == "FINISHED"
    assert [file.name for file in _files(runs) if file.is_file()] == ["one"]
    assert store.database(runs).is_file()
    assert [path.name for path in (tmp_path / "parent").iterdir()] == [name]


def test_a_runs_folder_that_has_two_paths_is_not_taken_for_one_that_was_moved(
    runs: Path, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    _log_artifact(run, "one")
    finish(run)
    before = seen(runs).run.info.artifact_uri
    link = runs.with_name("link")
    link.symlink_to(runs)
    store.settle(link)
    assert seen(runs).run.info.artifact_uri == before


def test_a_copy_has_an_mlflow_run_of_its_own_and_a_run_that_was_renamed_keeps_its(
    runs: Path, finish: Any, seen: Any
) -> None:
    run = make_run(runs)
    _log(run, 1, 2)
    finish(run)
    original = seen(runs).run.info.run_id
    renamed = RunDirectory(run.path.rename(run.path.with_name("b")))
    _log(renamed, 3)
    finish(renamed)
    assert seen(runs).run.info.run_id == original
    copies = [RunDirectory(run.path.with_name(name)) for name in ("a", "c")]
    for copy in copies:
        shutil.copytree(renamed.path, copy.path)
    for one in (*copies, renamed):
        _log(one, 4)
        finish(one)
    finish(copies[0])
    found = {one.data.tags["mlflow.runName"]: one.info.run_id for one in seen(runs).runs}
    assert sorted(found) == ["a", "b", "c"]
    assert found["b"] == original
    for mlflow_run in found.values():
        history = seen(runs).client.get_metric_history(mlflow_run, "loss")
        assert sorted(point.step for point in history) == [1, 2, 3, 4]


def test_a_rebuild_that_is_killed_is_gone_on_with(runs: Path, finish: Any, seen: Any) -> None:
    run = make_run(runs)
    for value in (1, 2):
        trainer = Trainer(run)
        trainer.resume(0)
        trainer.log(1, loss=value)
        trainer.end("finished")
    run.sinks.mkdir()
    with (
        storage.locked(ledger.lock_of(run, "mlflow")),
        pytest.raises(BadInput, match="is being shipped to mlflow now"),
    ):
        follower.rebuild(run)
    finish(run)
    assert seen(runs).points("loss") == [(1, 1)]
    follower.rebuild(run)
    for word in ("open", "ship", "conclude"):
        process = warm.process(run_dying_follower, run.path, word)
        process.start()
        process.join(DEADLINE)
        assert process.exitcode == -signal.SIGKILL
    finish(run)
    assert len(seen(runs).runs) == 2
    assert seen(runs).points("loss") == [(1, 2)]
    ledger.file_of(run, "mlflow").unlink()
    finish(run)
    assert len(seen(runs).runs) == 2, "the one that stands is found by its tags"


def test_a_feed_gives_the_fold_of_what_was_there_when_it_was_rebuilt_and_first_points_of_the_rest(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "runs")
    for attempt, resumed in enumerate([0, 300, 100, 200]):
        if attempt == 3:
            folded = feed.Cursor(journal.ends(run.journal))
            view_then = view.load(run)
        trainer = Trainer(run)
        trainer.resume(resumed)
        trainer.table("answers", resumed + 50, [{"attempt": attempt}])
        for step in range(resumed + 1, resumed + 700):
            trainer.log(step, loss=attempt)
        trainer.die()
    whole, taken, shown = feed.Feed(run.journal, feed.Cursor(), folded), [], []
    while not feed.reached(whole.cursor, feed.end(run.journal)):
        resumed_feed = feed.Feed(run.journal, whole.cursor, folded)
        batch = whole.take()
        assert resumed_feed.take() == batch
        taken += [(point.step, point.value) for point in batch.points]
        shown += [event["step"] for event in batch.media]
    then = view_then.points["loss"]
    assert taken == [*then.items(), *((s, 3) for s in range(800, 900))]
    assert (then[100], then[101]) == (0, 2), "the second attempt is void altogether"
    assert shown == [50, 150, 250]


def test_no_name_that_mlflow_refuses_reaches_it() -> None:
    names = ["loss", "val/loss", "a b:c", "ä", "a(b", "a[b", "", ".", "/a", "a//b", "../a", "a/", "x" * 300]
    keys = [mlflow_sink.key(name) for name in names]
    assert keys[:4] == names[:4]
    assert len(set(keys)) == len(keys)
    assert all(0 < len(key) <= 250 for key in keys)


def test_names_that_mlflow_refuses_for_an_at_or_a_percent_sign_are_spelled_out_and_stay_distinct() -> None:
    assert mlflow_sink.key("acc@1") == "acc__at__1"
    assert mlflow_sink.key("top-5 %") == "top-5 __percent__"
    names = ["recall_at_5", "a__b"]
    assert [mlflow_sink.key(name) for name in names] == names
    names += ["acc@1", "acc__at__1", "acc%1", "@at__", "__at@", "@@", "__at____at__", "a@(", "a__at__("]
    names += ["@" * 90]
    assert len({mlflow_sink.key(name) for name in names}) == len(names)
    assert all(len(mlflow_sink.key(name)) <= 250 for name in names)


def test_a_metric_with_another_name_in_mlflow_is_logged_once(runs: Path, finish: Any, seen: Any) -> None:
    run = make_run(runs)
    trainer = Trainer(run)
    for step in (1, 2):
        trainer.log(step, **{"acc@1": step / 2, "loss": 1.0})
    trainer.end("finished")
    assert follower.spawn(run).wait(DEADLINE) == 0
    assert seen(runs).points("acc__at__1") == [(1, 0.5), (2, 1.0)]
    said = (run.logs / "follower.log").read_text().splitlines()
    assert [line for line in said if "acc" in line] == [line for line in said if "'acc__at__1'" in line]
    assert sum("'acc__at__1'" in line for line in said) == 1
    assert not [line for line in said if "'loss'" in line]


def test_following_leaves_training_without_mlflow() -> None:
    code = "import sys, stoker.tracking.follower; assert not {'mlflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _shipped(run: RunDirectory) -> int:
    return feed.position(ledger.load(ledger.file_of(run, "mlflow")).cursor)


def _log(run: RunDirectory, *steps: int) -> None:
    trainer = Trainer(run)
    for step in steps:
        trainer.log(step, loss=step)
    trainer.end("finished")


def _log_artifact(run: RunDirectory, name: str) -> None:
    _write(run.artifacts / name, name.encode())
    _record_artifact(run, name)


def _record_artifact(run: RunDirectory, name: str) -> None:
    trainer = Trainer(run)
    files = artifacts.describe(run, run.artifacts / name)
    trainer.journal.append("artifact", name=name, kind="file", path=f"artifacts/{name}", files=files)
    trainer.end("finished")


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "mlartifacts").rglob("*"))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class _Recording:
    """Remembers of every batch how much of the journal a power cut would have left just then."""

    def __init__(self, on_disk: dict[int, int]) -> None:
        self._on_disk = on_disk
        self.left: list[int] = []

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        return SinkRun("1", "here")

    def ship(self, batch: Batch) -> None:
        self.left.append(sum(self._on_disk.values()))

    def conclude(self, ending: Ending) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_is_shipped_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs")
    on_disk: dict[int, int] = {}
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        known = os.fstat(descriptor)
        if known.st_ino in {file.stat().st_ino for file in run.journal.iterdir()}:
            on_disk[known.st_ino] = known.st_size

    monkeypatch.setattr(os, "fsync", noting)
    sink = _Recording(on_disk)
    shipper = Shipper(run, ledger.file_of(run, "recording"), lambda directory: sink)
    written = []
    for loss in range(2):
        trainer = Trainer(run)
        for step in range(2):
            trainer.log(2 * loss + step, loss=loss)
            written.append(feed.position(feed.end(run.journal)))
            assert shipper.ship_next()
        trainer.die()
    assert sink.left == written


@pytest.mark.parametrize("while_it_trains", [True, False])
def test_a_follower_that_was_killed_has_a_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_it_trains: bool
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "tensorboard")
    monkeypatch.setattr("stoker.tracking.background._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("stoker.tracking.shipping._PAUSE", 0.0 if while_it_trains else 3600.0)
    with Run("test", "a", runs=tmp_path) as run:
        run.log(loss=1.0)
        of_sink = ledger.file_of(run.directory, "tensorboard")
        until(lambda: ledger.load(of_sink).pid != 0)
        killed = ledger.load(of_sink).pid
        os.kill(killed, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the run has seen its end already
            os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
        run.log(loss=2.0)
        if while_it_trains:
            until(lambda: ledger.load(of_sink).pid != killed)
    (state,) = run.attempt.wait_for_sinks(DEADLINE)
    assert (state.pending, state.error) == (0, None)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_made_something_without_a_metric_is_shipped(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "tensorboard")
    (tmp_path / "table.csv").write_text("1\n")
    run = Run("test", "a", runs=tmp_path)
    if fails:
        run.artifact(tmp_path / "table.csv", name="table")
    run.attempt.leave(ZeroDivisionError() if fails else None)
    (state,) = run.attempt.wait_for_sinks(DEADLINE)
    assert (state.pending, state.error) == (0, None)
