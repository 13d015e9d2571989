"""Coordinates launchers on several machines that train one run: they meet at one of them.

Every launcher is given the same address. The launcher that has this address answers there; all launchers,
including itself, report to it twice a second, and are told what to do. When all have joined, a round
begins: ranks are started everywhere. When a rank fails, or a machine stops reporting, the round is over,
all ranks are ended, and the next round begins, as long as restarts are left. Each message uses its own
connection, with a time limit: a machine that is cut off is seen as missing messages.

If their number may change (`1:4`), a round begins with the machines that are available. A machine that
joins, or is told to stop, ends the round after a checkpoint; a machine that is lost ends it as soon as it
is missed. The next round has the others. None of this costs a restart. The machine at which they meet must
stay.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from stoker import machine
from stoker.errors import EXIT_FAILED, EXIT_PREEMPTED, BadInput, StokerError
from stoker.launch.budget import Budget, RankFailed
from stoker.words import counted

log = logging.getLogger("stoker")

BEAT = 0.5  # seconds between two messages of a machine
SILENCE = 10.0  # seconds without a message after which a machine counts as gone
COMING = 600.0  # seconds to wait for the others
LAST_CALL = 5.0  # seconds to wait for more machines than needed, before the first round
_COLLECT = 1.5  # seconds after a failure in which related failures may be reported
_MESSAGE = 3.0  # seconds that a message may take
_GOODBYE = 5.0  # seconds for the others to be told how it ended

_MARK = ".shared"
_LOOKS = 50
_NOT_SHARED = (
    "the runs folder of {host} is not the one that the other machines use: set --runs to a folder that they "
    "all share; for an object store, share its working copy, which is below STOKER_CACHE"
)

WAITING, RUNNING, FAILED, DONE, GONE = "waiting", "running", "failed", "done", "gone"


@dataclass(frozen=True)
class Machines:
    """The number of machines that train together: `2`, or from 1 to 4."""

    least: int = 1
    most: int = 1

    @classmethod
    def parsed(cls, given: object) -> Machines:
        """`2` or `1:4`. Raises BadInput."""
        text = str(given)
        least, colon, most = text.partition(":")
        most = most if colon else least
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise BadInput(f"--nodes {text}: give a number, such as 2, or a minimum and maximum, such as 1:4")
        return cls(int(least), int(most))

    @property
    def elastic(self) -> bool:
        """Whether their number may change."""
        return self.least < self.most

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


ONE = Machines()


@dataclass
class Report:
    """What a launcher reports about itself."""

    node: str
    host: str
    nproc: int
    nodes: str
    folder: str = ""
    """The id of the folder that all machines must share."""
    first: bool = False
    """Whether they meet at this machine: it is machine 0, and its ranks find each other there too."""
    round: int = 0
    """The newest round that it knows."""
    phase: str = WAITING
    leaving: bool = False
    """Whether it was told to stop."""
    said: str = ""
    """How its ranks failed."""
    ago: float = 0.0
    """Seconds since then."""
    raised: bool = False
    """Whether it was an exception."""
    again: bool = True
    changed: bool = False
    """As in `StokerError`."""
    code: int = 0
    step: int = -1
    saved: int = -1


@dataclass
class Answer:
    """What a launcher is told."""

    round: int = 0
    """The newest round; 0 before the first."""
    over: str = ""
    """Why that round is over, if it is."""
    number: int = 0
    """The number of this machine; -1 if it does not take part in the round."""
    machines: int = 1
    """The number of machines in the round."""
    changes: str = ""
    """Why the round will be ended after a checkpoint."""
    port: int = 0
    """The port where the ranks of the round meet."""
    id: str = ""
    """The id of the round."""
    ended: bool = False
    """Whether everything is over."""
    error: str = ""
    code: int = 0


@dataclass
class _Member:
    report: Report
    heard: float
    number: int = -1
    """Its number in the newest round."""


@dataclass
class _Host:
    """The state of the machine at which the others meet. Its methods are called under its lock."""

    nodes: Machines
    budget: Budget
    sizes: frozenset[int]
    """The possible numbers of machines in a round."""
    members: dict[str, _Member] = field(default_factory=dict)
    round: int = 0
    machines: int = 0
    """In the newest round."""
    running: bool = False
    over: str = "not begun"
    changes: str = ""
    failed_at: float | None = None
    failure: RankFailed | None = None
    final: bool = False
    port: int = 0
    id: str = ""
    answer: Answer | None = None
    """How it ended."""
    told: set[str] = field(default_factory=set)
    knocked: dict[str, float] = field(default_factory=dict)
    """When machines for which there was no room reported first."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    since: float = field(default_factory=time.monotonic)
    """When waiting for machines began, or the last one joined."""

    def hear(self, report: Report) -> Answer:
        """Process a report; returns what to do."""
        refused = self._refusal(report)
        if refused:
            return Answer(ended=True, code=2, error=refused)
        now, known = time.monotonic(), self.members.get(report.node)
        if report.phase == GONE or (report.leaving and not self._plays(known)):
            self._let_go(report, now)
            return self.answer or Answer(ended=True, code=EXIT_PREEMPTED)
        if known is None and not (self._has_room(report) or self._make_room()):
            return self._without_room(report, now)
        if known is None:
            known = self._take_in(report, now)
        known.report, known.heard = report, now
        self._judge(now)
        if self.answer is not None:
            self.told.add(report.node)
            return self.answer
        return Answer(self.round, self.over, known.number, self.machines, self.changes, self.port, self.id)

    def _refusal(self, report: Report) -> str:
        """Why a machine may not take part; empty if it may."""
        if report.nodes != str(self.nodes):
            return f"--nodes {report.nodes}: here it is --nodes {self.nodes}"
        if any(member.report.folder != report.folder for member in self.members.values()):
            return _NOT_SHARED.format(host=report.host)
        return ""

    def _without_room(self, report: Report, now: float) -> Answer:
        """What to tell a machine for which there is no room: to wait, until it is known whether one is gone.

        A launcher that was killed and is started again at once comes before it is missed.
        """
        if self.answer is not None:
            return self.answer
        if now - self.knocked.setdefault(report.node, now) < SILENCE + 2 * _COLLECT:
            return Answer(self.round, "there is no room", number=-1)
        return Answer(ended=True, code=2, error=f"all {self.nodes.most} machines have already joined")

    def _plays(self, member: _Member | None) -> bool:
        """Whether a machine is part of the current round."""
        return self.running and member is not None and member.number >= 0

    def _let_go(self, report: Report, now: float) -> None:
        """Remove a machine that says that it is leaving."""
        known = self.members.pop(report.node, None)
        if self._plays(known) and self.failure is None:
            self.failure, self.final, self.failed_at = RankFailed(f"{report.host} left"), False, now
            if self.nodes.elastic:
                self._pause(str(self.failure))

    def _take_in(self, report: Report, now: float) -> _Member:
        self.members[report.node] = _Member(report, now)
        self.since = now
        log.info(
            "%s joined with %s: %d of %s",
            report.host, counted(report.nproc, "rank"), len(self.members), self.nodes,
        )  # fmt: skip
        return self.members[report.node]

    def _has_room(self, report: Report) -> bool:
        """Whether there is room, keeping a place for the rendezvous machine, which may report later."""
        others = sum(not member.report.first for member in self.members.values())
        return report.first or others < self.nodes.most - 1

    def _make_room(self) -> bool:
        """Remove a machine that is gone, and plays no part in a round, to make room for a new one."""
        now = time.monotonic()
        silent = {node: member for node, member in self.members.items() if now - member.heard > SILENCE}
        gone = [node for node, member in silent.items() if not self._plays(member)]
        if not gone:
            return False
        del self.members[gone[0]]
        return True

    def _judge(self, now: float) -> None:
        if self.answer is not None:
            return
        if self.running:
            self._judge_round(now)
        else:
            self._judge_waiting(now)

    def _judge_waiting(self, now: float) -> None:
        """Begin a round with the available machines, if there are enough."""
        heard = [member for member in self.members.values() if now - member.heard < SILENCE]
        here = [member for member in heard if member.report.phase == WAITING and not member.report.leaving]
        size = self._size(len(here))
        all_here = len(here) == self.nodes.most
        settled = len(here) == len(heard) and (self.round > 0 or now - self.since > LAST_CALL)
        if size and (all_here or settled) and any(member.report.first for member in here):
            self._begin(here, size)
        elif now - self.since > COMING:
            code = EXIT_PREEMPTED if self.round else EXIT_FAILED
            self._end(code, f"only {len(here)} of {self.nodes} machines joined within {COMING:.0f} s")

    def _judge_round(self, now: float) -> None:
        playing = self._playing()
        self._look_for_failures(now, playing)
        done = all(member.report.phase == DONE for member in playing)
        if self.failed_at is not None and (self.final or now - self.failed_at > _COLLECT):
            self._over(now)
        elif len(playing) == self.machines and done:
            self._ended(max(member.report.code for member in playing), playing)
        elif self.nodes.elastic and not self.changes:
            others = [member for member in self.members.values() if member.number < 0]
            ready = [member for member in others if now - member.heard < SILENCE]
            if self._size(self.machines + len(ready)) > self.machines:
                self.changes = f"{', '.join(member.report.host for member in ready)} joined"

    def _of_round(self) -> list[_Member]:
        """The machines of the newest round."""
        return [member for member in self.members.values() if member.number >= 0]

    def _playing(self) -> list[_Member]:
        """Those of the round that know about it."""
        return [member for member in self._of_round() if member.report.round == self.round]

    def _size(self, here: int) -> int:
        """The largest possible round with this many machines; 0 if there are too few."""
        return max((size for size in self.sizes if size <= here), default=0)

    def _ended(self, code: int, playing: list[_Member]) -> None:
        """All ranks ended by themselves; if only the set of machines changes, the next round begins."""
        leaving = [member for member in playing if member.report.leaving]
        staying = sum(not member.report.leaving for member in self.members.values())
        stays = not any(member.report.first for member in leaving)
        if code == EXIT_PREEMPTED and (leaving or self.changes) and stays and self._size(staying):
            gone = ", ".join(member.report.host for member in leaving)
            self._pause(f"{gone} left" if gone else self.changes)
        else:
            self._end(code, "")

    def _look_for_failures(self, now: float, playing: list[_Member]) -> None:
        failed = [member for member in playing if member.report.phase == FAILED]
        silent = [m.report.host for m in self._of_round() if now - m.heard > SILENCE]
        if failed:
            # What ended a rank from outside takes precedence over the errors that this caused in others.
            first = min(failed, key=lambda m: (m.report.again, m.report.raised, m.heard - m.report.ago))
            self.failure, self.final = RankFailed(first.report.said), not first.report.again
            self.failure.raised, self.failure.exit_code = first.report.raised, first.report.code or 1
            self.failure.changed = first.report.changed
        elif silent:
            said = f"no message from {', '.join(silent)} for {SILENCE:.0f} s"
            self.failure, self.final = RankFailed(said), False
        if self.failure is not None:
            self.failed_at = now if self.failed_at is None else self.failed_at
            self.failure.step = max((member.report.step for member in playing), default=-1)
            self.failure.saved = max((member.report.saved for member in playing), default=-1)

    def _begin(self, here: list[_Member], size: int) -> None:
        for member in self.members.values():
            member.number = -1
        # The rendezvous machine is machine 0; machines that were together stay together.
        ordered = sorted(here, key=lambda member: (not member.report.first, -member.report.round))
        for number, member in enumerate(ordered[:size]):
            member.number = number
            log.info("%s is machine %d of %d", member.report.host, number, size)
        for member in ordered[size:]:
            log.info("%s is waiting: the work cannot be shared by %d machines", member.report.host, len(here))
        # Those that were in rounds of an earlier host, which is back since, wait for one after those.
        self.round = 1 + max(self.round, *(member.report.round for member in here))
        self.machines, self.running, self.over, self.changes = size, True, "", ""
        self.failed_at, self.failure = None, None
        self.port, self.id = machine.free_port(), uuid.uuid4().hex

    def _over(self, now: float) -> None:
        """End the round; this costs a restart, unless it failed because of a machine that may be lost."""
        assert self.failure is not None
        lost = [member.report.host for member in self._of_round() if now - member.heard > _COLLECT]
        if self.nodes.elastic and lost and not self.final:
            self._pause(f"{', '.join(lost)} does not respond")
            return
        self._pause(str(self.failure), quiet=True)
        try:
            if self.final:
                raise self.failure
            self.budget.spend(self.failure)
        except RankFailed as error:
            if lost and not self.final:  # training itself did not fail: it can be started again
                gone = f"{', '.join(lost)} does not respond, so all machines have ended"
                again = "once it is back, the same command resumes"
                self._end(EXIT_PREEMPTED, f"{gone}; {again}.\n{error}")
            else:
                self._end(error.exit_code, str(error))
        else:
            log.warning("%s\nstarting again; restarts left: %d", self.failure, self.budget.left)

    def _pause(self, why: str, *, quiet: bool = False) -> None:
        """The round is over; the next one will follow."""
        self.running, self.over, self.since = False, why, time.monotonic()
        if not quiet:
            log.info("%s: continuing with the machines that are available", why)

    def _end(self, code: int, error: str) -> None:
        self.answer = Answer(self.round, self.over, ended=True, code=code, error=error)


class Seat:
    """This machine's connection to the rendezvous.

    Args:
        address: the rendezvous.
        nproc: ranks on this machine.
        nodes: how many machines there will be.
        folder: the id of the shared folder.
        first: whether the rendezvous is at this machine.
    """

    def __init__(
        self, address: tuple[str, int], nproc: int, nodes: Machines, folder: str = "", *, first: bool = False
    ) -> None:
        self._address = address
        self._report = Report(uuid.uuid4().hex, platform.node(), nproc, str(nodes), folder, first)
        self._answer = Answer()
        self._failed_at = 0.0
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)
        self._thread.start()

    @property
    def first(self) -> bool:
        """Whether the rendezvous is at this machine."""
        return self._report.first

    def next_round(self) -> Answer:
        """Wait for the next round, or the end. Raises StokerError, BadInput if that is an error."""
        self._say(phase=WAITING)
        done = self._report.round
        if self.why_over() and not self._answer.ended:
            log.info("%s; waiting for the others to start again", self.why_over())
        while True:
            answer = self._answer
            if answer.error:
                self._raise(answer)
            if answer.ended:
                return answer
            if answer.round > done and not answer.over and answer.number >= 0:
                self._say(round=answer.round, phase=RUNNING, said="", code=0)
                return answer
            if time.monotonic() - self._heard > COMING:
                code = EXIT_PREEMPTED if done else EXIT_FAILED
                self._raise(Answer(code=code, error=f"{self._where} does not answer for {COMING:.0f} s"))
            time.sleep(BEAT / 5)

    def finished(self, code: int) -> int:
        """Report that the ranks here are done, and wait for the others. -1 if the round was over before."""
        self._say(phase=DONE, code=code)
        while not self._answer.ended:
            if self.why_over():
                return -1
            time.sleep(BEAT / 5)
        if self._answer.error:
            self._raise(self._answer)
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

    def changes(self) -> str:
        """Why the round must be ended after a checkpoint; empty if it need not be."""
        answer = self._answer
        return answer.changes if answer.round == self._report.round and not answer.over else ""

    def why_over(self) -> str:
        """Why the round that this machine takes part in is over; empty if it is not."""
        answer, silence = self._answer, time.monotonic() - self._heard
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
        return f"{self._address[0]}:{self._address[1]}"

    def _say(self, **fields: Any) -> None:
        with self._lock:
            for name, value in fields.items():
                setattr(self._report, name, value)

    def _raise(self, answer: Answer) -> None:
        error = (BadInput if answer.code == BadInput.exit_code else StokerError)(answer.error)
        error.exit_code = answer.code
        raise error

    def _talk(self) -> None:
        while not self._closed.is_set():
            self._tell()
            self._closed.wait(BEAT)

    def _tell(self) -> None:
        with self._lock:
            self._report.ago = time.time() - self._failed_at
            message = json.dumps(asdict(self._report)).encode()
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self._answer = Answer(**_ask(self._address, message))
            self._heard = time.monotonic()


@contextlib.contextmanager
def seat(
    rendezvous: str,
    nproc: int,
    nodes: Machines,
    max_restarts: int,
    sizes: frozenset[int],
    shared: Path | None = None,
) -> Iterator[Seat]:
    """Take part; also answer the others if the address is this machine's. Raises BadInput.

    Args:
        sizes: the possible numbers of machines in a round.
        shared: a folder that all machines must share.
    """
    address = parsed(rendezvous)
    folder = _id_of(shared) if shared is not None else ""
    host = _Host(nodes, Budget(max_restarts), sizes)
    server = _serve(address, host) if _is_here(address[0]) else None
    place = Seat(address, nproc, nodes, folder, first=server is not None)
    try:
        yield place
    finally:
        if server is not None:
            _let_others_hear(server[1])
        place.close()
        if server is not None:
            server[0].shutdown()
            server[0].server_close()


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
    """`node0:29500` as host and port. Raises BadInput."""
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(
            f"--rendezvous {rendezvous}: give the HOST:PORT of one of the machines, such as node0:29500"
        )
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise BadInput(f"--rendezvous {rendezvous}: cannot resolve {host}: {error}") from error
    return host, int(port)


def interface_towards(host: str) -> str | None:
    """The network interface towards a host; None if it cannot be determined."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                return str(name)
    return None


def _is_here(host: str) -> bool:
    own = {address.address for of_one in psutil.net_if_addrs().values() for address in of_one}
    return any(str(found[4][0]) in own for found in socket.getaddrinfo(host, None))


def _serve(address: tuple[str, int], host: _Host) -> tuple[ThreadingHTTPServer, _Host] | None:
    """Answer at an address; None if another launcher on this machine does."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _MESSAGE

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

        def do_POST(self) -> None:
            try:
                report = Report(**json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                with host.lock:
                    answer = host.hear(report)
            except (TypeError, ValueError):
                self.send_error(400)
                return
            content = json.dumps(asdict(answer)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    try:
        server = ThreadingHTTPServer(("", address[1]), Handler)
    except OSError:
        return None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), name="nodes-host", daemon=True).start()
    return server, host


def _let_others_hear(host: _Host) -> None:
    """Before this machine ends, wait until all others have been told how it ended."""
    if host.answer is None:
        with host.lock:
            host._end(1, f"{platform.node()}, the rendezvous machine, has ended")
    deadline = time.monotonic() + _GOODBYE
    while time.monotonic() < deadline and host.told < host.members.keys():
        time.sleep(BEAT / 5)


def _ask(address: tuple[str, int], message: bytes) -> dict[str, Any]:
    connection = http.client.HTTPConnection(*address, timeout=_MESSAGE)
    try:
        connection.request("POST", "/", message, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}")
        found: dict[str, Any] = json.loads(response.read())
        return found
    finally:
        connection.close()
