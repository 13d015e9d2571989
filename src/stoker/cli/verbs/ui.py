"""`stoker ui`: serve MLflow's UI for the embedded store, on this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Annotated

import typer
from stoker import signals
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, answer
from stoker.errors import BadInput, StokerError
from stoker.run import finding
from stoker.tracking import store

_HOST = "127.0.0.1"
_START_TIMEOUT = 120.0  # seconds
_STOP_TIMEOUT = 10.0

Server = subprocess.Popen[bytes]


def ui(
    runs: RunsFolder = DEFAULT_RUNS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to serve on.")] = 5000,
    json: Json = False,
) -> None:
    """Serve MLflow's UI for the embedded store, until Ctrl-C."""
    database = store.database(runs)
    if not database.is_file():
        if (elsewhere := store.server_uri()) is not None:
            raise BadInput(f"runs are tracked at {store.without_credentials(elsewhere)}: open that page")
        raise BadInput(f"no runs are tracked under {finding.shown(runs)} yet: start one first")
    _check_free(port)
    store.settle(runs)
    with tempfile.TemporaryFile() as output, _serving(runs, port, output) as server:
        url = f"http://{_HOST}:{port}"
        _wait_until_it_answers(server, url, output)
        found = {"url": url, "store": str(database)}
        answer(json, found, f"{_shows(url, database)}; press Ctrl-C to stop")
        if server.wait() != 0:
            raise StokerError(f"the MLflow server exited: {_last_line(output)}")


def _shows(url: str, database: Path) -> str:
    elsewhere = store.without_credentials(store.server_uri() or "")
    rest = f", but not what is tracked at {elsewhere} (MLFLOW_TRACKING_URI)" if elsewhere else ""
    return f"{store.page(url)} shows {database}{rest}"


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise BadInput(
                f"port {port} cannot be used: {error.strerror}; choose another with --port"
            ) from error


@contextmanager
def _serving(runs: Path, port: int, output: IO[bytes]) -> Iterator[Server]:
    """Run MLflow's server in its own process group, ended with the block. Ctrl-C ends the block."""
    uri, artifacts = store.embedded_uri(runs), store.artifacts(runs).as_uri()
    server = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "mlflow", "server", "--host", _HOST, "--port", str(port),
            "--workers", "1", "--backend-store-uri", uri, "--artifacts-destination", artifacts,
        ],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        with signals.handled(_interrupt, signals.ENDED_BY):
            yield server
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _environment() -> dict[str, str]:
    """This process's environment without MLflow's variables, and with its background jobs turned off."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**mine, **store.QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(server: Server) -> None:
    """End the server's whole process group, since its workers are separate processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(_STOP_TIMEOUT)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def _wait_until_it_answers(server: Server, url: str, output: IO[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise StokerError(f"the MLflow server did not start: {_last_line(output)}")
        try:
            with direct.open(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise StokerError(f"the MLflow server did not answer at {url} within {_START_TIMEOUT:.0f} s")


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
