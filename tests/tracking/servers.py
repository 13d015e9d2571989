"""Real servers for the tests of tracking: PostgreSQL, MLflow on it, and a proxy that misbehaves."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stoker.tracking import store

_START_TIMEOUT = 120.0


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_binaries() -> Path | None:
    """The folder of PostgreSQL's server programs, where Debian puts them or on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """A PostgreSQL server of its own; yields the URI of an empty database. As root, run by `postgres`."""
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="stoker-postgres-"))
    data, port = folder / "data", free_port()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "user": user}
    try:
        if user is not None:
            shutil.chown(folder, user)
        initdb = [binaries / "initdb", "-D", data, "-U", "stoker", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C"], check=True, cwd=folder, **quiet)
        settings = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={folder}",
            "-c",
            "fsync=off",
        ]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-p", str(port), *settings], cwd=folder, **quiet
        )
        try:
            create = [binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "stoker", "mlflow"]
            deadline = time.monotonic() + _START_TIMEOUT
            while subprocess.run(create, check=False, cwd=folder, **quiet).returncode != 0:
                assert server.poll() is None, "PostgreSQL did not start"
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"postgresql+psycopg2://stoker@127.0.0.1:{port}/mlflow"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(folder: Path, backend: str | None = None, port: int | None = None) -> Iterator[str]:
    """MLflow's own tracking server; yields its URL once it answers."""
    chosen = free_port() if port is None else port
    folder.mkdir(parents=True, exist_ok=True)
    where = ["--backend-store-uri", backend] if backend else []
    with (folder / "server.log").open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(chosen), "--workers", "1", *where],
            cwd=folder,
            env={**os.environ, **store.QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_for(f"http://127.0.0.1:{chosen}/health", server)
        yield f"http://127.0.0.1:{chosen}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        assert server.poll() is None, "MLflow's server did not start"
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)


class Proxy:
    """Stands before a server, and does to every request what `mode` says.

    ok: passes it on; 500, 429: answers so; hang: never answers; refuse: closes the connection.
    `required`, where it is given, is the Authorization header without which the answer is 401.
    """

    def __init__(self, target: str, required: str | None = None) -> None:
        self.mode = "ok"
        self.seen: dict[str, int] = {}
        """Requests by the mode that they met."""
        self._released = threading.Event()
        host, port = target.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen[proxy.mode] = proxy.seen.get(proxy.mode, 0) + 1
                if proxy.mode == "hang":
                    proxy._released.wait()
                elif proxy.mode in ("500", "429"):
                    self.send_error(int(proxy.mode))
                elif proxy.mode == "ok" and required not in (None, self.headers.get("Authorization")):
                    self.send_error(401)
                elif proxy.mode == "ok":
                    self._pass_on(body)
                self.close_connection = True

            def _pass_on(self, body: bytes) -> None:
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("host", "authorization")
                }
                connection.request(self.command, self.path, body, {**headers, "Host": f"{host}:{port}"})
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                connection.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
