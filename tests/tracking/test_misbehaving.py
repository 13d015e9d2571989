"""Sinks that misbehave: training goes on, one line warns, and the sink is complete once it is back."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from stoker.run import artifacts, view
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, ledger, store
from synthetic_run import DEADLINE, Seen, Trainer, make_run, pending, until

from servers import Proxy
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own

SCRIPT = Path(__file__).with_name("digits_run.py")
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@pytest.fixture
def proxy(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """MLflow behind a proxy; every test has an experiment of its own."""
    standing = Proxy(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", standing.url)
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    monkeypatch.setenv("EXPERIMENT", tmp_path.name)
    yield standing
    standing.close()


def _train(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A training with an impatient client of MLflow; this process's own is not."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        env={**os.environ, **IMPATIENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _logged(folder: Path) -> list[int]:
    """The steps of a run that has ended."""
    steps = list(view.load(_run(folder)).points["loss"])
    assert steps == list(range(1, len(steps) + 1))
    return steps


def _fill(file: IO[bytes]) -> None:
    while True:
        file.write(b"x" * 4096)


def _run(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "runs" / folder.name / "a")


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["500", "429", "hang", "refuse"] if SOAK else ["hang"])
def test_training_ends_while_the_server_fails_and_sync_completes_it(
    tmp_path: Path, proxy: Proxy, server: str, stoker: Any, mode: str
) -> None:
    proxy.mode = mode
    trainer = _train(tmp_path, "1", "90", "--finish", "--pause", "0.1", "--until", "said")
    until(lambda: follower.failing(_run(tmp_path)), trainer)
    (tmp_path / "said").touch()
    _, said = trainer.communicate(timeout=DEADLINE)
    assert trainer.returncode == 0
    assert proxy.seen[mode] > 0
    warnings = [line for line in said.decode().splitlines() if "mlflow" in line]
    assert len(warnings) == 1, said.decode()
    assert "training continues" in warnings[0]
    assert view.load(_run(tmp_path)).status == "finished"
    (state,) = follower.state(_run(tmp_path))
    assert state.pending > 90
    shown = stoker("runs", "show", "a").out
    assert f"mlflow  {state.pending}" in shown

    proxy.mode = "ok"
    assert stoker("sync", "a").code == 0
    seen = Seen(server, tmp_path.name)
    assert seen.status == "FINISHED"
    assert [step for step, _ in seen.points("loss")] == _logged(tmp_path)
    assert len(seen.runs) == 1


def test_a_server_that_stops_in_the_middle_gets_every_point_once(
    tmp_path: Path, proxy: Proxy, server: str
) -> None:
    trainer = _train(tmp_path, "1", "1", "--finish", "--pause", "0.05", "--until", "over")
    for mode in ("ok", "refuse", "ok", "500", "hang"):
        proxy.mode = mode
        before = proxy.seen.get(mode, 0)
        until(lambda: proxy.seen.get(proxy.mode, 0) > before)  # noqa: B023 - called at once
    proxy.mode = "ok"
    (tmp_path / "over").touch()
    trainer.communicate(timeout=DEADLINE)
    until(lambda: follower.state(_run(tmp_path))[0].pending == 0)
    seen = Seen(server, tmp_path.name)
    until(lambda: Seen(server, tmp_path.name).status == "FINISHED")
    assert [step for step, _ in seen.points("loss")] == _logged(tmp_path)


WHO = [
    ("Basic bWU6c2VjcmV0", {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret"}),
    ("Bearer secret", {"MLFLOW_TRACKING_TOKEN": "secret"}),
]


@pytest.mark.soak(small=False)
@pytest.mark.parametrize(("required", "environment"), WHO)
def test_a_server_that_asks_who_it_is_is_told_from_the_environment_and_nothing_is_written_down(
    tmp_path: Path, server: str, stoker: Any, monkeypatch: pytest.MonkeyPatch, required: str,
    environment: dict[str, str],
) -> None:  # fmt: skip
    guarded = Proxy(server, required)
    try:
        monkeypatch.setenv("STOKER_SINKS", "mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        run = make_run(tmp_path / "runs", name=tmp_path.name[-30:])
        trainer = Trainer(run)
        trainer.log(1, loss=1.0)
        trainer.end("finished")
        refused = stoker("sync", run.id)
        assert refused.code == 1
        assert "401" in refused.err
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert stoker("sync", run.id).code == 0
        assert pending(run) == 0
    finally:
        guarded.close()
    for file in run.path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file


@pytest.mark.soak
@pytest.mark.parametrize(
    ("mode", "kept"), [("ok", []), *([("405", ["model/old", "model/older"])] if SOAK else [])]
)
def test_replaced_artifacts_are_deleted_over_http_if_the_server_allows_it(
    tmp_path: Path, server: str, stoker: Any, monkeypatch: pytest.MonkeyPatch, mode: str, kept: list[str]
) -> None:
    proxy = Proxy(server, only=lambda method, path: method == "DELETE")
    proxy.mode = mode
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    run = make_run(tmp_path / "runs", experiment=f"replaced-{mode}")
    try:
        for contents in (["old", "older", "same"], ["new", "same"]):
            folder = tmp_path / "model"
            folder.mkdir(exist_ok=True)
            for name in ("old", "older", "new", "same"):
                (folder / name).unlink(missing_ok=True)
            for name in contents:
                (folder / name).write_text(str(contents))
            files = artifacts.describe(run, artifacts.bring_in(run, folder, "model"))
            trainer = Trainer(run)
            trainer.journal.append(
                "artifact", name="model", kind="model", path="artifacts/model", files=files
            )
            trainer.end("finished")
            assert stoker("sync", run.id).code == 0
            assert pending(run) == 0
    finally:
        proxy.close()
    seen = Seen(server, run.experiment)
    assert seen.artifacts("model") == sorted(["model/new", "model/same", *kept])
    same = seen.client.download_artifacts(seen.run.info.run_id, "model/same")
    assert Path(same).read_text() == "['new', 'same']"
    said = (run.logs / "follower.log").read_text()
    assert said.count("MLflow cannot delete artifacts") == bool(kept)


@pytest.mark.soak
@pytest.mark.parametrize("is_server", [True, False] if SOAK else [True])
def test_artifacts_of_any_name_arrive_and_are_replaced(
    tmp_path: Path, server: str, stoker: Any, monkeypatch: pytest.MonkeyPatch, is_server: bool
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    if is_server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run = make_run(runs, experiment="any-name")
    names = ["x#1.txt", "x#2.txt", "p%20q.txt", "p q.txt", "p%2520q.txt", "a?b", "a;b", "a%b", "größe.txt"]
    folder = tmp_path / "sub?dir"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    for given in [folder, *(folder / name for name in names)]:
        _ship_artifact(run, given)
    assert stoker("sync", run.id).code == 0
    seen = Seen(server if is_server else store.embedded_uri(runs), run.experiment)
    inside = f"sub_dir-{_mark('sub?dir')}"
    for places in (seen.artifacts(inside), [place for place in seen.artifacts() if place != inside]):
        files = [seen.client.download_artifacts(seen.run.info.run_id, place) for place in places]
        assert sorted(Path(file).read_text() for file in files) == sorted(names)

    for name in names[1:]:
        (folder / name).unlink()
    _ship_artifact(run, folder)
    assert stoker("sync", run.id).code == 0
    assert seen.artifacts(inside) == [f"{inside}/x_1-{_mark('x#1.txt')}.txt"]


def _mark(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:6]


def _ship_artifact(run: RunDirectory, given: Path) -> None:
    files = artifacts.describe(run, artifacts.bring_in(run, given, given.name))
    trainer = Trainer(run)
    path = f"artifacts/{given.name}"
    trainer.journal.append("artifact", name=given.name, kind="file", path=path, files=files)
    trainer.end("finished")


@pytest.mark.soak(small=False)
def test_a_full_disk_under_sqlite_stops_nothing_and_room_completes_it(
    tmp_path: Path, empty_store: Path, stoker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (small / "mlflow.db").write_bytes(empty_store.read_bytes())
        filler = small / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            _fill(file)
        monkeypatch.setenv("STOKER_SINKS", "mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small}/mlflow.db")
        monkeypatch.setenv("EXPERIMENT", tmp_path.name)
        trainer = _train(tmp_path, "1", "90", "--finish", "--pause", "0.1", "--until", "said")
        until(lambda: follower.failing(_run(tmp_path)), trainer)
        (tmp_path / "said").touch()
        _, said = trainer.communicate(timeout=DEADLINE)
        assert trainer.returncode == 0
        assert view.load(_run(tmp_path)).status == "finished"
        assert "full" in (ledger.load(ledger.file_of(_run(tmp_path), "mlflow")).error or "")
        assert sum("mlflow" in line for line in said.decode().splitlines()) == 1
        filler.unlink()
        assert stoker("sync", "a").code == 0
        seen = Seen(os.environ["MLFLOW_TRACKING_URI"], tmp_path.name)
        assert [step for step, _ in seen.points("loss")] == _logged(tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_next_start_completes_a_sink(tmp_path: Path, runs: Path, stoker: Any, monkeypatch: Any) -> None:
    """A follower that was killed with its trainer left points behind: the run's next attempt ships them."""
    monkeypatch.setenv("STOKER_SINKS", "none")
    _train(tmp_path, "2", "30", "--finish").communicate(timeout=DEADLINE)  # without all that step 1 logs
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    trainer = _train(tmp_path, "31", "40", "--finish")
    trainer.communicate(timeout=DEADLINE)
    run = RunDirectory(runs / "digits" / "a")
    until(lambda: follower.state(run)[0].pending == 0)
    seen = Seen(store.embedded_uri(runs))
    assert [step for step, _ in seen.points("loss")] == list(range(2, 41))
