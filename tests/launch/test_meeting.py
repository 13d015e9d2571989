"""Launchers that meet: machines that end without a word, and are back."""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from stoker.errors import EXIT_FAILED, EXIT_PREEMPTED, BadInput, StokerError
from stoker.launch import nodes, rounds
from stoker.launch.budget import Budget
from stoker.launch.nodes import Seat
from stoker.launch.rounds import Answer, Machines, Report

from servers import free_port
from support import LONG, SOAK, until

TWO = Machines(2, 2)
VERSIONS = rounds.versions()
CONFIG = {"lr": 0.1, "size": 2, "data": "x", "workers": 8, "cache": "/a"}


class Meeting:
    """An address at which launchers meet."""

    def __init__(self) -> None:
        self.address = ("127.0.0.1", free_port())
        self._pool = ThreadPoolExecutor()
        self._ends = ExitStack()

    def host(self) -> Callable[[], None]:
        """Answer there; returns what ends that, without a word."""
        server = nodes._serve(self.address, rounds.Host(TWO, Budget(3), frozenset({2})))
        assert server is not None
        ended = threading.Event()

        def end() -> None:
            if not ended.is_set():
                ended.set()
                server.shutdown()
                server.server_close()

        self._ends.callback(end)
        return end

    def seat(self, *, first: bool = False) -> Seat:
        made = Seat(self.address, 1, TWO, first=first)
        self._ends.callback(lambda: kill(made))
        return made

    def round_of(self, seat: Seat) -> Future[Answer]:
        return self._pool.submit(seat.next_round)

    def close(self) -> None:
        self._ends.close()
        self._pool.shutdown()


def kill(seat: Seat) -> None:
    seat._closed.set()
    seat._thread.join()


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setattr(nodes, "SILENCE", 2.0)
    monkeypatch.setattr(nodes, "COMING", LONG)
    made = Meeting()
    yield made
    made.close()


def test_when_the_machine_where_they_meet_is_back_the_others_join_its_round(meeting: Meeting) -> None:
    end = meeting.host()
    first, other = meeting.seat(first=True), meeting.seat()
    rounds = [meeting.round_of(seat) for seat in (first, other)]
    assert [one.result(LONG).round for one in rounds] == [1, 1]
    kill(first)
    end()
    waits = meeting.round_of(other)
    meeting.host()
    back = meeting.round_of(meeting.seat(first=True))
    answers = [one.result(LONG) for one in (back, waits)]
    assert [answer.number for answer in answers] == [0, 1]
    assert answers[0].id == answers[1].id


def test_a_machine_that_is_back_before_it_is_missed_waits_for_its_place(meeting: Meeting) -> None:
    meeting.host()
    first, other = meeting.seat(first=True), meeting.seat()
    for one in [meeting.round_of(seat) for seat in (first, other)]:
        one.result(LONG)
    kill(other)
    back = meeting.round_of(meeting.seat())
    again = meeting.round_of(first)
    answers = [one.result(LONG) for one in (again, back)]
    assert [(answer.round, answer.number) for answer in answers] == [(2, 0), (2, 1)]


def test_one_machine_too_many_is_refused_once_none_of_the_others_is_gone(meeting: Meeting) -> None:
    meeting.host()
    seats = [meeting.seat(first=True), meeting.seat()]
    for one in [meeting.round_of(seat) for seat in seats]:
        one.result(LONG)
    with pytest.raises(BadInput, match="all 2 machines have already joined"):
        meeting.round_of(meeting.seat()).result(LONG)


def test_a_machine_that_is_told_to_stop_before_it_has_ranks_ends_the_others_as_a_preemption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    host = rounds.Host(TWO, Budget(0), frozenset({2}))
    reports = [Report(name, name, 1, "2", first=name == "a") for name in "ab"]
    answers = [host.hear(report) for report in reports]
    assert [host.hear(report).number for report in reports] == [0, 1]
    a, b = (dataclasses.replace(report, round=1, phase=rounds.RUNNING) for report in reports)
    host.hear(a)
    assert not answers[0].ended
    assert host.hear(dataclasses.replace(b, phase=rounds.GONE, leaving=True)).code == EXIT_PREEMPTED
    clock[0] = 2.0
    ended = host.hear(a)
    assert (ended.ended, ended.code) == (True, EXIT_PREEMPTED)
    assert ended.error == (
        "b was told to stop, so all machines have ended; once it is back, the same command resumes"
    )


@pytest.mark.parametrize(("told", "code"), [(True, EXIT_PREEMPTED), (False, EXIT_FAILED)])
def test_the_machine_where_they_meet_ends_the_others_as_it_ends(told: bool, code: int) -> None:
    host = rounds.Host(TWO, Budget(0), frozenset({2}))
    waits = Report("b", "b", 1, "2")
    host.hear(waits)
    host.end_with_host("a", told=told)
    assert host.hear(waits).code == code


@pytest.mark.parametrize(
    ("by", "code"),
    [
        ((), EXIT_FAILED),
        (("KUBERNETES_SERVICE_HOST",), EXIT_PREEMPTED),
        (("KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID"), EXIT_FAILED),
    ],
)
def test_who_waits_in_vain_is_to_be_started_again_where_machines_come_one_by_one(
    by: tuple[str, ...], code: int, meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one where they meet, for the other; and the other, for that one."""
    monkeypatch.setattr(rounds, "COMING", 1.0)
    monkeypatch.setattr(nodes, "COMING", 1.0)
    for name in by:
        monkeypatch.setenv(name, "1")
    alone = meeting.seat()
    with pytest.raises(StokerError, match="does not answer for 1 s") as caught:
        meeting.round_of(alone).result(LONG)
    assert caught.value.exit_code == code
    kill(alone)
    monkeypatch.setattr(nodes, "COMING", LONG)
    meeting.host()
    with pytest.raises(StokerError, match="only 1 of 2 machines joined within 1 s") as caught:
        meeting.round_of(meeting.seat(first=True)).result(LONG)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"run": "test/b"}, "b trains test/b, but a, which meets the others at the same address, test/a: "),
        ({"config": {**CONFIG, "size": 4}, "given": []}, "size=4 on b, size=2 on a: give the same command"),
        (
            {"versions": {**VERSIONS, "torch": "2.12.1"}},
            f"b has torch 2.12.1, a torch {VERSIONS['torch']}: every machine needs the same version",
        ),
        ({"versions": {}}, "b has stoker ?, torch ?, a stoker "),
        ({"script": "x"}, "the script on b is not the one on a: every machine needs the same version"),
        ({"config": {**CONFIG, "data": None}}, "data=none on b, data=x on a: give the same command on every"),
    ],
)
def test_a_machine_that_is_told_something_else_is_refused_and_the_others_train(
    told: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "stoker")
    host = rounds.Host(Machines(1, 3), Budget(0), frozenset({1, 2, 3}))
    same: dict[str, Any] = {
        "run": "test/a", "config": CONFIG, "given": ["lr", "data", "cache", "size"], "versions": VERSIONS,
    }  # fmt: skip
    first = Report("a", "a", 1, "1:3", first=True, **same)
    host.hear(first)
    for _ in range(2):
        refused = host.hear(Report("b", "b", 1, "1:3", **{**same, **told}))
        assert (refused.ended, refused.code) == (True, 2)
        assert said in refused.error
    assert [record.getMessage() for record in caplog.records] == [f"b was refused: {refused.error}"]
    assert not host.hear(first).ended
    other = {**same, "config": {**CONFIG, "workers": 2, "cache": "/b"}}  # as suits another machine
    assert not host.hear(Report("c", "c", 1, "1:3", **other)).ended


def test_where_they_meet_decides_what_is_trained() -> None:
    host = rounds.Host(Machines(1, 3), Budget(0), frozenset({1, 2, 3}))
    early, right = Report("b", "b", 1, "1:3", run="test/b"), Report("c", "c", 1, "1:3", run="test/a")
    assert not host.hear(early).ended
    first = Report("a", "a", 1, "1:3", run="test/a", first=True)
    assert not host.hear(first).ended
    assert host.hear(early).code == 2
    assert not host.hear(right).ended


class _Stranger(BaseHTTPRequestHandler):
    status = 501

    def do_POST(self) -> None:
        self.send_error(self.status)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of another program."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_where_another_program_answers_is_said_at_once_on_every_machine(stranger: int) -> None:
    said = f"--rendezvous 127.0.0.1:{stranger}: another program answers there; give a port that is free"
    here = nodes.seat(f"127.0.0.1:{stranger}", 1, TWO, 0, frozenset({2}))
    with pytest.raises(BadInput, match=said), here:
        pass
    elsewhere = Seat(("127.0.0.1", stranger), 1, TWO)
    try:
        with pytest.raises(BadInput, match=said):
            elsewhere.next_round()
    finally:
        kill(elsewhere)


def test_a_launcher_of_another_version_is_named_where_they_meet(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    meeting.host()
    for _ in range(2):
        with pytest.raises(nodes._Refused):
            nodes._ask(meeting.address, b'{"of_another_version": 1}')
    assert caplog.messages == ["a launcher of another version of stoker was refused, at 127.0.0.1"]


def test_a_machine_that_was_only_slow_is_not_said_to_be_lost() -> None:
    clock = [100.0]
    host = rounds.Host(TWO, Budget(3), frozenset({2}), clock=lambda: clock[0])
    a, b = Report("a", "a", 1, "2", first=True), Report("b", "b", 1, "2")
    for one in (a, b, a):
        begun = host.hear(one)
    assert begun.round == 1
    for one in (a, b):
        one.round, one.phase = 1, rounds.RUNNING
        host.hear(one)
    failed = dataclasses.replace(a, phase=rounds.FAILED, said="rank 0: no such file", raised=True)
    host.hear(failed)
    clock[0] += 1.6
    assert host.hear(failed).lost == "b does not respond"
    host.hear(dataclasses.replace(b, phase=rounds.FAILED, said="it lost its peer"))
    for one in (a, b, a):
        begun = host.hear(dataclasses.replace(one, phase=rounds.WAITING))
    assert (begun.round, begun.lost) == (2, "")


@pytest.mark.parametrize("dies", [True, False])
def test_an_exception_is_not_blamed_while_a_machine_may_report_what_caused_it(dies: bool) -> None:
    clock = [100.0]
    host = rounds.Host(TWO, Budget(3), frozenset({2}), clock=lambda: clock[0])
    a, b = Report("a", "a", 1, "2", first=True), Report("b", "b", 1, "2")
    for one in (a, b, a):
        host.hear(one)
    for one in (a, b):
        one.round, one.phase = 1, rounds.RUNNING
        host.hear(one)
    a = dataclasses.replace(a, phase=rounds.FAILED, said="rank 0: its peer is gone", raised=True)
    for _ in range(12):  # six seconds
        assert [host.hear(one).over for one in (a, b)] == ["", ""]
        clock[0] += 0.5
    if dies:
        b = dataclasses.replace(b, phase=rounds.FAILED, said="rank 1 was killed")
    clock[0] += 1.5
    host.hear(b)
    assert host.hear(a).over == ("rank 1 was killed" if dies else "rank 0: its peer is gone")


def test_a_machine_that_does_not_come_back_is_named_at_the_end() -> None:
    clock = [100.0]
    host = rounds.Host(TWO, Budget(3), frozenset({2}), clock=lambda: clock[0])
    a, b = Report("a", "a", 1, "2", first=True), Report("b", "b", 1, "2")
    for one in (a, b):
        host.hear(one)
    for one in (a, b):
        one.round, one.phase = 1, rounds.RUNNING
        host.hear(one)
    clock[0] += rounds.SILENCE + 1
    host.hear(a)
    clock[0] += 2
    assert host.hear(a).lost == "b does not respond"
    clock[0] += rounds.COMING + 1
    ended = host.hear(dataclasses.replace(a, phase=rounds.WAITING))
    assert (ended.code, ended.lost) == (EXIT_PREEMPTED, "b does not respond")
    assert ended.error == "only 1 of 2 machines joined within 600 s: b does not respond"


@pytest.mark.parametrize(("status", "answer"), [(400, "{}"), (200, '{"of_another_version": 1}')])
def test_a_launcher_of_another_version_is_said_to_be_one(
    status: int, answer: str, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post(handler: _Stranger) -> None:
        handler.send_response(status)
        handler.send_header(nodes._HEADER, "1")
        handler.end_headers()
        handler.wfile.write(answer.encode())

    monkeypatch.setattr(_Stranger, "do_POST", post)
    seat = Seat(("127.0.0.1", stranger), 1, TWO)
    try:
        with pytest.raises(BadInput, match="a launcher of another version of stoker answers there"):
            seat.next_round()
    finally:
        kill(seat)


def test_a_proxy_is_waited_for_that_says_that_nothing_is_there(
    stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Stranger, "status", 503)
    monkeypatch.setattr(nodes, "COMING", 2.0)
    seat = Seat(("127.0.0.1", stranger), 1, TWO)
    try:
        with pytest.raises(StokerError, match=f"127.0.0.1:{stranger} does not answer for 2 s"):
            seat.next_round()
    finally:
        kill(seat)


def test_a_port_that_is_taken_by_what_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_MESSAGE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        here = nodes.seat(address, 1, TWO, 0, frozenset({2}))
        said = f"--rendezvous {address}: Address already in use; give a port that is free"
        with pytest.raises(BadInput, match=said), here:
            pass


@pytest.mark.soak
@pytest.mark.parametrize("host", ["[::1]", *(["127.0.0.1"] if SOAK else [])])
def test_a_machine_says_what_it_waits_for_and_which_one_it_is(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_UNHEARD", 0.0)
    caplog.set_level("INFO", "stoker")
    port, pool = free_port(), ThreadPoolExecutor()
    address = nodes.parsed(f"{host}:{port}")
    other = Seat(address, 1, TWO)
    joins = pool.submit(other.next_round)
    until(lambda: f"{host}:{port} does not answer yet: waiting up to 600 s" in caplog.messages)
    with nodes.seat(f"{host}:{port}", 1, TWO, 0, frozenset({2})) as seat:
        begun = pool.submit(seat.next_round)
        assert (begun.result(LONG).number, joins.result(LONG).number) == (0, 1)
        kill(other)
    pool.shutdown()
    assert "this is machine 1 of 2" in caplog.messages
    assert not [said for said in caplog.messages if "not begun" in said]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("node0", "give the HOST:PORT of one of the machines"),
        ("[]:1", "give the HOST:PORT of one of the machines"),
        ("fd00::1:29500", "write an IPv6 address as [fd00::1]:29500"),
    ],
)
def test_an_address_that_is_none_is_refused(given: str, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        nodes.parsed(given)


def test_a_name_that_only_this_machine_reaches_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /etc/hosts of Debian."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(nodes.socket, "getaddrinfo", lambda *_: found)
    assert nodes._is_here("node0")
    (said,) = caplog.messages
    assert said.startswith("node0 is 127.0.1.1 on this machine, which no other one reaches: ")
    assert nodes._is_here("127.0.1.1")
    assert len(caplog.messages) == 1


def test_machines_that_were_suspended_together_were_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    host = rounds.Host(TWO, Budget(0), frozenset({2}))
    reports = [Report(name, name, 1, "2", first=name == "a") for name in "ab"]
    for report in reports:
        host.hear(report)
    reports = [dataclasses.replace(report, round=1, phase=rounds.RUNNING) for report in reports]
    for report in (*reports, *reports):
        clock[0] += 3600.0  # and each goes on at its own time
        assert host.hear(report).over == ""
    for _ in range(25):
        clock[0] += 0.5
        answer = host.hear(reports[0])
    assert answer.error.startswith("b does not respond, so all machines have ended")


def test_a_machine_that_was_suspended_asks_before_it_believes_that_the_others_are_gone(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SILENCE", LONG)
    end = meeting.host()
    seats = [meeting.seat(first=True), meeting.seat()]
    for begun in [meeting.round_of(seat) for seat in seats]:
        assert begun.result(LONG).round == 1
    seat = seats[1]
    slept = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0])
    monkeypatch.setattr(rounds, "time", clock)
    slept[0] = 2 * LONG
    assert seat.why_over() == ""
    end()
    for _ in range(10_000):  # an answer to what it had asked before may still come
        slept[0] += 4.0
        if "does not answer for" in seat.why_over():
            return
        time.sleep(0.001)
    pytest.fail("it still believes that somebody answers")


def test_a_lost_machine_leaves_its_place_to_another_while_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock of its own: reports twice a second, each of a machine that trains when it is told to."""
    clock = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    host = rounds.Host(Machines(1, 2), Budget(0), frozenset({1, 2}))
    answers: dict[str, Answer] = {}

    def pass_by(seconds: int, *machines: str) -> None:
        for _ in range(2 * seconds):
            clock[0] += 0.5
            for name in machines:
                told = answers.get(name, Answer())
                waits = told.over or told.round == 0 or told.number < 0
                trains = rounds.DONE if told.changes else rounds.RUNNING  # ranks end with a checkpoint then
                phase = rounds.WAITING if waits else trains
                code = EXIT_PREEMPTED if phase == rounds.DONE else 0
                first, known = name == "host", told.round
                report = Report(name, name, 1, "1:2", first=first, round=known, phase=phase, code=code)
                answers[name] = host.hear(report)

    pass_by(30, "host", "lost")
    assert host.now.size == 2
    pass_by(30, "host")
    assert (host.now.size, host.now.running) == (1, True)
    pass_by(30, "host", "new")
    assert not answers["new"].ended
    assert (host.now.size, answers["new"].number) == (2, 1)
