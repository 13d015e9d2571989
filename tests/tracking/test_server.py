"""Against a real MLflow server: down at first, and the embedded store's own pages."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from stoker.cli.verbs import ui
from stoker.run import artifacts
from stoker.tracking import follower, store
from synthetic_run import DEADLINE, Seen, Trainer, make_run, pending, until

from servers import free_port
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own


@pytest.fixture
def port() -> int:
    """A port of this machine that nothing listens on."""
    return free_port()


@pytest.fixture
def serve(tmp_path: Path, port: int, empty_store: Path) -> Iterator[Callable[[], None]]:
    """Starts MLflow's own server, on a store of its own."""
    servers: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        folder = tmp_path / "server"
        folder.mkdir()
        shutil.copy(empty_store, folder / "mlflow.db")  # where a server has its store by default
        servers.append(
            subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"],
                cwd=folder,
                env={**os.environ, **store.QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    yield start
    for server in servers:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def test_a_server_that_is_down_stops_nothing_and_is_complete_once_it_is_back(
    tmp_path: Path, serve: Any, port: int, stoker: Any, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    run = make_run(tmp_path / "runs")
    trainer = Trainer(run)
    process = spawn(run, patience=600.0)  # the server takes long to start on a slow machine
    for step in range(1, 201):
        trainer.log(step, loss=1 / step, odd=math.nan if step == 2 else math.inf)
    until(lambda: follower.state(run)[0].error is not None)
    (run.artifacts / "report.html").write_text("<html>")
    files = artifacts.describe(run, run.artifacts)
    trainer.journal.append("artifact", name="report.html", kind="report", path="artifacts", files=files)
    trainer.end("finished")
    (state,) = follower.wait(run, process, DEADLINE)
    assert process.returncode is None
    assert state.error is not None
    assert state.pending > 200
    assert state.since is not None
    assert "secret" not in f"{state.error} {state.where}" + (run.logs / "follower.log").read_text()

    answer = stoker("sync", "a", "--json")  # says what the living follower is failing with
    assert answer.code == 1
    assert "lacks 20" in answer.answer["error"]

    serve()
    assert process.wait(DEADLINE) == 0
    mlflow = Seen(f"http://127.0.0.1:{port}")
    assert mlflow.status == "FINISHED"
    assert mlflow.points("loss") == [(s, 1 / s) for s in range(1, 201)]
    assert len(mlflow.points("odd")) == 200
    assert mlflow.artifacts() == ["report.html"]
    (state,) = follower.state(run)
    assert (state.pending, state.error) == (0, None)
    page = f"/#/experiments/1/runs/{mlflow.run.info.run_id}?workflowType=machine_learning"
    assert state.where == f"http://127.0.0.1:{port}{page}"
    assert not store.database(tmp_path / "runs").exists()


def test_ui_says_that_it_does_not_serve_the_server_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    page = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    shown = f"{page} shows {tmp_path / 'mlflow.db'}"
    assert ui._shows("http://127.0.0.1:5000", tmp_path / "mlflow.db") == shown
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@there")
    elsewhere = ", but not what is tracked at http://there (MLFLOW_TRACKING_URI)"
    assert ui._shows("http://127.0.0.1:5000", tmp_path / "mlflow.db") == shown + elsewhere


UNUSABLE = [
    ("localhost:5601", "MLFLOW_TRACKING_URI=localhost:5601 lacks its scheme: set it to http://localhost:5601"),
    ("./mlr", "MLFLOW_TRACKING_URI=./mlr is a folder"),
    ("file:///tmp/mlr", "MLFLOW_TRACKING_URI=file:///tmp/mlr is a folder"),
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        *(UNUSABLE if SOAK else UNUSABLE[:1]),
        ("http://me:secret@127.0.0.1:PORT", "http://127.0.0.1:PORT does not answer"),
    ],
)
def test_a_script_of_a_moment_says_that_its_store_cannot_be_used(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, uri: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("PORT", str(port)))
    script = (
        "import stoker\nfrom stoker.tracking import shipping\nshipping._ANSWER_TIMEOUT = 60.0\n"
        "with stoker.Run('e', 'a') as run: run.log(loss=1.0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (line,) = ended.stderr.splitlines()
    assert said.replace("PORT", str(port)) in line
    assert "`stoker sync a`" in line
    assert "secret" not in line


@pytest.mark.parametrize(("uri", "said"), UNUSABLE)
def test_an_address_that_no_store_can_have_is_refused(
    uri: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert said in str(store.unusable())


@pytest.mark.parametrize(
    "uri",
    ["", "http://127.0.0.1:5000", "sqlite:///a.db", "databricks", "databricks://me", "postgresql://a:5/b"],
)
def test_an_address_that_mlflow_may_know_is_not_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store.unusable() is None


def test_sync_ships_what_no_follower_did_and_ui_shows_it(
    tmp_path: Path, stoker: Any, start: Any, port: int, empty_store: Path
) -> None:
    refused = stoker("ui", "--port", str(port))
    assert refused.code == 2
    assert "start one first" in refused.err

    run = make_run(tmp_path / "runs")
    shutil.copy(empty_store, store.database(tmp_path / "runs"))
    trainer = Trainer(run)
    for step in range(1, 11):
        trainer.log(step, loss=1 / step)
    trainer.end("finished")
    answer = stoker("sync", "a", "--json").answer
    assert answer["sinks"][0]["shipped"] == 12  # with how the attempt began and the run ended
    assert pending(run) == 0
    assert Seen(store.embedded_uri(tmp_path / "runs")).points("loss") == [(s, 1 / s) for s in range(1, 11)]

    process = start("ui", "--port", str(port), "--json", cold=True)
    said = json.loads(process.stdout.readline())
    assert said == {"url": f"http://127.0.0.1:{port}", "store": str(tmp_path / "runs" / "mlflow.db")}
    assert b"<title>MLflow</title>" in _fetch(said["url"])
    assert Seen(said["url"]).status == "FINISHED"
    assert stoker("ui", "--port", str(port)).code == 2
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0
    assert not psutil.wait_procs(children, timeout=DEADLINE)[1]
    with pytest.raises(urllib.error.URLError):
        _fetch(said["url"])
