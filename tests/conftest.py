"""What the tests share: an environment apart from the user's, and the command as a process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported, of which this process has one thread too: beside other workers of pytest, threads
# that wait for each other at the end of each operation keep the cores that they wait for.
os.environ["OMP_NUM_THREADS"] = "1"
# Read as gcsfs is imported, by whichever test is the first: else it asks by gRPC what kind of bucket each is,
# which no emulator answers, for ten seconds.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import fsspec
import hypothesis
import pytest
from stoker import object_store, storage

import warm
from commands import SECRET, Command, Done, Point, Start
from servers import Proxy, s3_server
from support import LONG, SOAK

hypothesis.settings.register_profile(  # a slow machine is no failure
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

STARTING = {"cli", "engine", "language", "launch", "tracking", "report", "run"}
"""The folders whose tests start processes by the forkserver."""


def pytest_collection_finish(session: pytest.Session) -> None:
    if STARTING & {item.path.parent.name for item in session.items}:
        warm.start()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to `make soak` the long tests that have no small form; shorter ones of their kind run always."""
    left = [
        item
        for item in items
        if any(not mark.kwargs.get("small", True) for mark in item.iter_markers("soak")) and not SOAK
    ]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """The log is as it was when the test began: a command that ran in this process shows its messages."""
    stoker = logging.getLogger("stoker")
    level, propagates, handlers = stoker.level, stoker.propagate, [*stoker.handlers]
    yield
    stoker.setLevel(level)
    stoker.propagate, stoker.handlers[:] = propagates, handlers


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for this session alone; `precision=auto` is fp32 by it, whatever this CPU is good at."""
    from stoker.engine import precision

    folder = tmp_path_factory.mktemp("cache")
    storage.write_json(folder / "bf16_speed.json", {precision.measured_for(): 1.0})
    return folder


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sink unless a test asks for one, one thread a process, no hub.

    The code of a test's recipe is what it imports: the repository that it is in, this one, is not bundled.
    """
    # A shell ignores SIGINT for what it runs in the background, and so would the processes started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setenv("STOKER_SINKS", "none")
    monkeypatch.setenv("STOKER_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path(__file__).parents[1]))
    for name in ("STOKER_RUNS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `stoker ARGUMENTS` in a folder of its own; whatever still runs at the end is killed.

    It is forked from a server that has imported torch. `cold`, or where its environment would have it import
    otherwise, it is a Python that begins with nothing. `first` is Python that a forked one executes before.
    """
    processes: list[Any] = []

    def run(
        *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, cold: bool = False,
        first: str = "",
    ) -> Any:  # fmt: skip
        folder, environment = cwd or tmp_path, {**os.environ, **(env or {})}
        if warm.fits(environment) and not cold:
            processes.append(warm.Command(arguments, environment=environment, folder=folder, first=first))
            return processes[-1]
        assert not first
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "stoker", *arguments],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # of its own, so that a test can signal all of it
        ))  # fmt: skip
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def stoker(start: Start) -> Command:
    """Run `stoker ARGUMENTS` to its end."""

    def run(*arguments: str, **options: Any) -> Done:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=LONG)
        return Done(process.returncode, out.decode(), err.decode())

    return run


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    """Write lines to a file of the test's folder."""

    def write(name: str, lines: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def point_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """Have this process ask the hub of an address, with a cache of its own; its client's patience is long."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for patience in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, patience, 2 * LONG)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    yield point
    close_session()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 with a bucket named `bucket`."""
    with s3_server("bucket") as url:
        yield url


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before that S3, in the way of what is written; the environment has what is needed to reach it."""
    made = Proxy(s3, only=lambda method, path: method in ("PUT", "POST"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # No patience of the driver's own: what is tried again is by ours, and by s3fs.
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {
        "read_timeout": 1, "connect_timeout": 1, "retries": {"mode": "standard", "max_attempts": 1}
    }}))  # fmt: skip
    monkeypatch.setattr(object_store, "_away_until", {})
    object_store._file_system.cache_clear()  # of another test's server and credentials
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield made
    made.close()
