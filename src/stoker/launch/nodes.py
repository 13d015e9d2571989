"""Connects launchers on several machines that train one run: they meet at one of them.

Every launcher is given the same address. The launcher that has this address answers there; all launchers,
including itself, report to it twice a second, and are told what to do (see `rounds.py`). Each message uses
its own connection, with a time limit: a machine that is cut off is seen as missing messages.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import json
import logging
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from stoker import world
from stoker.errors import BadInput, StokerError, Stopped
from stoker.launch.budget import Budget, RankFailed
from stoker.launch.rounds import (
    COMING,
    DONE,
    FAILED,
    GONE,
    NO_WORK,
    RUNNING,
    SILENCE,
    WAITING,
    Answer,
    Awake,
    Host,
    Machines,
    Report,
    Work,
    versions,
    waited,
)

log = logging.getLogger("stoker")

BEAT = 0.5  # seconds between two messages of a machine
_MESSAGE = 3.0  # seconds that a message may take
_GOODBYE = 5.0  # seconds for the others to be told how it ended

_UNHEARD = 3.0  # seconds without an answer after which it is said that this machine waits
_HEADER = "X-Stoker-Launcher"
_OF_PROXIES = (502, 503, 504)  # what a proxy in between answers while nothing is there
_TRIES = 3  # to reach the launcher that may have taken the port
_OTHER_LAUNCHER = (
    "--rendezvous {where}: a launcher of another version of stoker answers there: "
    "every machine needs the same version"
)
_TAKEN = "--rendezvous {where}: another program answers there; give a port that is free on that machine"

_MARK = ".shared"
_LOOKS = 50


class _Stranger(Exception):
    """What answers is no launcher."""


class _Refused(OSError):
    """A launcher answers, which does not understand the message."""


class Seat:
    """This machine's connection to the rendezvous.

    Args:
        address: the rendezvous.
        nproc: ranks on this machine.
        nodes: how many machines there will be.
        folder: the id of the shared folder.
        work: what is trained.
        first: whether the rendezvous is at this machine.
    """

    def __init__(
        self,
        address: tuple[str, int],
        nproc: int,
        nodes: Machines,
        folder: str = "",
        work: Work = NO_WORK,
        *,
        first: bool = False,
    ) -> None:
        self._address = address
        self._report = Report(uuid.uuid4().hex, platform.node(), nproc, str(nodes), folder, *work, first)
        self._report.versions = versions()
        self._stranger = ""
        self._answer = Answer()
        self._failed_at = 0.0
        self._clock = Awake()
        self._heard = self._clock()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)
        self._thread.start()

    @property
    def first(self) -> bool:
        """Whether the rendezvous is at this machine."""
        return self._report.first

    @property
    def lost(self) -> str:
        """Which machines made the last round fail that is over, and how."""
        return self._answer.lost

    def next_round(self) -> Answer:
        """Wait for the next round, or the end. Raises StokerError, BadInput if that is an error."""
        self._say(phase=WAITING)
        done = self._report.round
        if done and self.why_over() and not (self._answer.ended or self.first or self.leaves):
            log.info("%s; waiting for the others to start again", self.why_over())
        told = _Told(self._where)
        while True:
            answer = self._answer
            if self._stranger:
                raise BadInput(self._stranger)
            if not (done or self.first):
                told.waiting(self._clock() - self._heard, answer, self._report.nodes)
            if answer.error:
                raise _error(answer.code, answer.error)
            if answer.ended:
                return answer
            if answer.round > done and not answer.over and answer.number >= 0:
                self._say(round=answer.round, phase=RUNNING, said="", code=0)
                if not self.first:
                    log.info("this is machine %d of %d", answer.number, answer.machines)
                return answer
            if self._clock() - self._heard > COMING:
                code, said = waited(f"{self._where} does not answer for {COMING:.0f} s", begun=done > 0)
                raise _error(code, said)
            time.sleep(BEAT / 5)

    def finished(self, code: int) -> int:
        """Report that the ranks here are done, and wait for the others. -1 if the round was over before."""
        self._say(phase=DONE, code=code)
        while not self._answer.ended:
            if self.why_over():
                return -1
            time.sleep(BEAT / 5)
        if self._answer.error:
            raise _error(self._answer.code, self._answer.error)
        return self._answer.code

    def failed(self, failure: StokerError, again: bool) -> None:
        """Report that the ranks here failed, and wait until that is received."""
        raised = isinstance(failure, RankFailed) and failure.raised
        self._failed_at = (isinstance(failure, RankFailed) and failure.at) or time.time()
        self._say(
            phase=FAILED,
            said=str(failure),
            raised=raised,
            again=again,
            code=failure.exit_code,
            changed=failure.changed,
        )
        while not self.why_over():
            time.sleep(BEAT / 5)

    def progress(self, step: int, saved: int) -> None:
        """Report the progress of the ranks here."""
        self._say(step=step, saved=saved)

    def leave(self) -> None:
        """Report that this machine was told to stop."""
        self._say(leaving=True)

    @property
    def leaves(self) -> bool:
        """Whether this machine was told to stop."""
        return self._report.leaving

    def changes(self) -> str:
        """Why the round must be ended after a checkpoint; empty if it need not be."""
        answer = self._answer
        return answer.changes if answer.round == self._report.round and not answer.over else ""

    def why_over(self) -> str:
        """Why the round that this machine takes part in is over; empty if it is not."""
        answer, silence = self._answer, self._clock() - self._heard
        if answer.ended:
            return answer.error or "it has ended"
        if answer.over or answer.round > self._report.round:
            return answer.over or "the others have started again"
        return f"{self._where} does not answer for {silence:.0f} s" if silence > SILENCE else ""

    def close(self) -> None:
        """Leave, and say so."""
        self._closed.set()
        self._thread.join()
        if not self._answer.ended and not self._report.first:
            self._say(phase=GONE)
            self._tell()

    @property
    def _where(self) -> str:
        return written(*self._address)

    def _say(self, **fields: Any) -> None:
        with self._lock:
            for name, value in fields.items():
                setattr(self._report, name, value)

    def _talk(self) -> None:
        while not self._closed.is_set():
            self._tell()
            self._closed.wait(BEAT)

    def _tell(self) -> None:
        with self._lock:
            self._report.ago = time.time() - self._failed_at
            message = json.dumps(asdict(self._report)).encode()
        try:
            self._answer = Answer(**_ask(self._address, message))
            self._heard, self._stranger = self._clock(), ""
        except _Stranger:
            self._stranger = _TAKEN.format(where=self._where)
        except (_Refused, TypeError):
            self._stranger = _OTHER_LAUNCHER.format(where=self._where)
        except (OSError, http.client.HTTPException, ValueError):
            pass


class _Told:
    """What a machine is told while it waits for the first round, once each."""

    def __init__(self, where: str) -> None:
        self._where, self._waits, self._joined = where, False, 0

    def waiting(self, silence: float, answer: Answer, nodes: str) -> None:
        """Say that the rendezvous does not answer yet, or how many machines are there."""
        if silence > _UNHEARD and not self._waits:
            self._waits = True
            log.info("%s does not answer yet: waiting up to %.0f s", self._where, COMING)
        waits = answer.over and not answer.round and not answer.ended
        if waits and answer.machines != self._joined:
            self._joined = answer.machines
            log.info("joined at %s: %d of %s", self._where, answer.machines, nodes)


@contextlib.contextmanager
def seat(
    rendezvous: str,
    nproc: int,
    nodes: Machines,
    max_restarts: int,
    sizes: frozenset[int],
    shared: Path | None = None,
    work: Work = NO_WORK,
) -> Iterator[Seat]:
    """Take part; also answer the others if the address is this machine's. Raises BadInput.

    Args:
        sizes: the possible numbers of machines in a round.
        shared: a folder that all machines must share.
        work: what is trained, which must be the same on all machines.
    """
    address = parsed(rendezvous)
    folder = _id_of(shared) if shared is not None else ""
    host = Host(nodes, Budget(max_restarts), sizes)
    server = _serve(address, host) if _is_here(address[0]) else None
    place = Seat(address, nproc, nodes, folder, work, first=server is not None)
    try:
        yield place
    except (Stopped, KeyboardInterrupt):
        place.leave()
        raise
    finally:
        if server is not None:
            _let_others_hear(host, told=place.leaves)
        place.close()
        if server is not None:
            server.shutdown()
            server.server_close()


def _id_of(folder: Path) -> str:
    """An id that is the same on all machines sharing this folder, written by the first. Raises BadInput."""
    file = folder / _MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), file.open("x", encoding="ascii") as new:
            new.write(uuid.uuid4().hex)
        for _ in range(_LOOKS):
            if found := file.read_text(encoding="ascii"):
                return found
            time.sleep(0.1)
    except OSError as error:
        raise BadInput(f"{folder} is not writable: {error.strerror}") from error
    return ""


def parsed(rendezvous: str) -> tuple[str, int]:
    """`node0:29500` or `[fd00::1]:29500` as host and port. Raises BadInput."""
    host, _, port = rendezvous.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(
            f"--rendezvous {rendezvous}: give the HOST:PORT of one of the machines, such as node0:29500"
        )
    if ":" in host and host != f"[{bare}]":
        raise BadInput(f"--rendezvous {rendezvous}: write an IPv6 address as [{bare}]:{port}")
    host = bare
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        said = f"--rendezvous {rendezvous}: cannot resolve {host}: {error}"
        if not world.comes_one_by_one():
            raise BadInput(said) from error
        code, said = waited(said, begun=False)  # its pod has no address now
        raise _error(code, said) from error
    return host, int(port)


def written(host: str, port: int) -> str:
    """An address as one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_towards(host: str) -> str | None:
    """The network interface towards a host; None if it cannot be determined."""
    with contextlib.suppress(OSError), socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                return str(name)
    return None


def _error(code: int, said: str) -> StokerError:
    """What ends this machine's command with an exit code."""
    error = (BadInput if code == BadInput.exit_code else StokerError)(said)
    error.exit_code = code
    return error


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _is_here(host: str) -> bool:
    own = {address.address for of_one in psutil.net_if_addrs().values() for address in of_one}
    addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    local = {found for found in addresses if ipaddress.ip_address(found.partition("%")[0]).is_loopback}
    if local == addresses and host not in (*local, "localhost"):
        log.warning(
            "%s is %s on this machine, which no other one reaches: give its name or address in the network",
            host, ", ".join(sorted(local)),
        )  # fmt: skip
    return bool(local or addresses & own)


def _serve(address: tuple[str, int], host: Host) -> ThreadingHTTPServer | None:
    """Answer at an address; None if another launcher on this machine does.

    Raises BadInput if another program does, or the port cannot be used.
    """

    class Server(ThreadingHTTPServer):
        address_family = _family(address[0])

    class Handler(BaseHTTPRequestHandler):
        timeout = _MESSAGE

        def end_headers(self) -> None:
            self.send_header(_HEADER, "1")
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

        def do_POST(self) -> None:
            message = b""
            try:
                message = self.rfile.read(int(self.headers["Content-Length"]))
                report = Report(**json.loads(message))
            except (TypeError, ValueError):
                if message and (sender := self.client_address[0]) not in host.strangers:
                    host.strangers.add(sender)
                    log.warning("a launcher of another version of stoker was refused, at %s", sender)
                self.send_error(400)
                return
            with host.lock:
                answer = host.hear(report)
            content = json.dumps(asdict(answer)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    try:
        server = Server(("", address[1]), Handler)
    except OSError as error:
        if not _is_answered(address):
            free = "; give a port that is free" if error.errno == errno.EADDRINUSE else ""
            raise BadInput(f"--rendezvous {written(*address)}: {error.strerror}{free}") from error
        return None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), name="nodes-host", daemon=True).start()
    return server


def _is_answered(address: tuple[str, int]) -> bool:
    """Whether a launcher answers at an address, which may just have begun. Raises BadInput for a stranger."""
    for _ in range(_TRIES):
        try:
            _ask(address, b"")
            return True
        except _Refused:
            return True
        except _Stranger as error:
            raise BadInput(_TAKEN.format(where=written(*address))) from error
        except (OSError, http.client.HTTPException):
            time.sleep(BEAT)
    return False


def _let_others_hear(host: Host, *, told: bool) -> None:
    """Before this machine ends, wait until all others have been told how it ended."""
    with host.lock:
        host.end_with_host(platform.node(), told=told)
    deadline = time.monotonic() + _GOODBYE
    while time.monotonic() < deadline and host.told < host.members.keys():
        time.sleep(BEAT / 5)


def _ask(address: tuple[str, int], message: bytes) -> dict[str, Any]:
    connection = http.client.HTTPConnection(*address, timeout=_MESSAGE)
    try:
        connection.request("POST", "/", message, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.getheader(_HEADER) is None:
            if response.status in _OF_PROXIES:
                raise OSError(f"status {response.status}")
            raise _Stranger
        if response.status != 200:
            raise _Refused(f"status {response.status}")
        found: dict[str, Any] = json.loads(response.read())
        return found
    finally:
        connection.close()
