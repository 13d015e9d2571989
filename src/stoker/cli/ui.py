"""`stoker ui`: MLflow's own UI on the store beside the runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.errors import BadInput, StokerError

_HOST = "127.0.0.1"
_START_TIMEOUT = 120.0  # seconds


def ui(
    runs: RunsFolder = DEFAULT_RUNS,
    port: Annotated[
        int, typer.Option(help="Where the UI answers, on this machine alone.", min=1, max=65535)
    ] = 5000,
    json: Json = False,
) -> int:
    """Show the runs in MLflow's UI, until Ctrl-C."""
    database = runs.absolute() / "mlflow.db"
    if not database.is_file():
        raise BadInput(f"{database} does not exist yet: the first run under {runs} makes it")
    _check_free(port)
    url, store = f"http://{_HOST}:{port}", f"sqlite:///{database}"
    server = _serve(store, database.parent, port)
    try:
        _wait_until_it_answers(server, url)
        if json:
            print_json({"url": url, "store": store})
        else:
            console().print(f"{url} shows {store}; Ctrl-C ends it")
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()
    return 0


def _serve(store: str, runs: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", _HOST,
        "--port", str(port),         "--workers", "1",
        "--default-artifact-root", (runs / "mlartifacts").as_uri(),
    ]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
    return subprocess.Popen(
        command, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise BadInput(
                f"port {port} cannot be used ({error.strerror}): choose another with --port"
            ) from error


def _wait_until_it_answers(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise StokerError(f"MLflow's server ended with {server.returncode} before it answered")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise StokerError(f"MLflow's server did not answer within {_START_TIMEOUT:.0f} s")
