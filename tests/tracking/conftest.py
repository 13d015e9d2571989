"""What the tests of tracking share: processes that start at once, and MLflow's own client."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, store
from synthetic_run import Seen, make_store, run_follower

import warm
from servers import mlflow_server, postgres, postgres_binaries
from support import LONG

Follow = Callable[..., ForkServerProcess]


@pytest.fixture(autouse=True)
def sinks(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_SINKS", "mlflow")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded store without runs, made once: that takes MLflow seconds."""
    database = store.database(tmp_path_factory.mktemp("store"))
    process = warm.process(make_store, database)
    process.start()
    process.join()
    return database


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server, on PostgreSQL where that is installed; each test has experiments of its own."""
    binaries = postgres_binaries()
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres(binaries)) if binaries else None
        yield stack.enter_context(mlflow_server(tmp_path_factory.mktemp("mlflow"), database))


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    """A runs folder with an embedded store."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, store.database(folder))
    return folder


@pytest.fixture
def follow() -> Iterator[Follow]:
    """Start a follower's process; whatever still runs at the end is killed."""
    processes: list[ForkServerProcess] = []

    def start(run: RunDirectory, patience: float = 60.0, **environment: str) -> ForkServerProcess:
        process = warm.process(run_follower, run.path, environment, patience)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


PATIENT = """
import sys
from stoker.tracking import follower
follower.PATIENCE = float(sys.argv.pop())
sys.exit(follower.main())
"""


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a follower as training does, or one of another patience; whatever runs at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: RunDirectory, patience: float | None = None) -> subprocess.Popen[bytes]:
        if patience is None:
            processes.append(follower.spawn(run))
        else:
            with (run.logs / "follower.log").open("ab") as log:
                command = [sys.executable, "-c", PATIENT, str(run.path), str(patience)]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def finish(follow: Follow) -> Callable[[RunDirectory], None]:
    """Follow a run whose trainer is gone to its end."""

    def run(directory: RunDirectory) -> None:
        process = follow(directory)
        process.join(LONG)
        assert process.exitcode == 0

    return run


@pytest.fixture
def seen() -> Callable[[Path], Seen]:
    """Read the embedded store of a runs folder."""
    return lambda runs: Seen(store.embedded_uri(runs))
