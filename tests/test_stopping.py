"""How signals are answered: kept for a step boundary within a loop, at once outside of one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stoker import signals, terminal
from stoker.errors import Stopped
from stoker.stopping import StopRequests

from support import LONG, handles, pending, until


def _steps(requests: StopRequests) -> Iterator[int]:
    with requests.deferred():
        yield from range(3)


def test_within_a_loop_a_signal_is_kept_for_the_step_boundary() -> None:
    requests = StopRequests()
    for step in _steps(requests):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        assert requests.requested == (None if step == 0 else "preempted")


def test_after_a_loop_that_was_left_by_break_it_is_answered_at_once() -> None:
    requests = StopRequests()
    with requests.handled():
        for _ in _steps(requests):
            break
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("by", ["deadline", "search"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_after_a_stop_for_another_reason_is_not_the_second(
    by: str, number: signal.Signals
) -> None:
    """A checkpoint that is being written is finished."""
    requests = StopRequests()
    with requests.handled():
        for step in _steps(requests):
            if step == 1 and by == "deadline":
                requests.deadline = time.monotonic()
            elif step == 1:
                requests.ask("paused")
            asked = requests.requested
            if step == 2:
                signal.raise_signal(number)
                assert not requests.at_once
                assert requests.requested == asked == ("preempted" if by == "deadline" else "paused")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert requests.at_once


def test_a_message_within_a_write_that_the_signal_interrupted_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(terminal.Outlived):
        told = False

        def write(self, data: Any, /) -> int:
            if not self.told:
                self.told = True
                signal.raise_signal(signal.SIGINT)
            return super().write(data)

    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted(os.dup(2))), write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    requests = StopRequests()
    for step in _steps(requests):
        if step == 0:
            stream.write("a line of the log\n")
            stream.flush()
        assert requests.requested == "interrupted"
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert "a line of the log" in said


def test_a_terminal_that_is_closed_is_one_signal_although_shell_and_kernel_send_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel once the shell has ended, which may be seconds later."""
    monkeypatch.setattr(signals, "_ONE", 0.0)
    requests = StopRequests()
    with requests.handled(), requests.deferred():
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
    assert (requests.requested, requests.at_once) == ("interrupted", False)


def test_where_it_is_ignored_from_the_start_nobody_answers_a_closed_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = StopRequests()
        with requests.handled():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert requests.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def heard_before() -> Iterator[list[int]]:
    """What reaches the handler that there was before stoker's."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in signals.STATUS}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_repeats_a_request_does_not_end_the_process_that_has_just_answered_it(
    heard_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals every process and a launcher passes it on, maybe when the run has ended already."""
    monkeypatch.setattr(signals, "_ONE", LONG)
    requests = StopRequests()
    with requests.handled(), requests.deferred():
        signal.raise_signal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.raise_signal(number)
    assert heard_before == []
    monkeypatch.setattr(signals, "_ONE", 0.0)
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert heard_before == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


def test_after_a_run_that_nobody_stopped_signals_are_anothers_again(heard_before: list[int]) -> None:
    requests = StopRequests()
    with requests.handled(), requests.deferred():
        pass
    for number in signals.STATUS:
        signal.raise_signal(number)
    assert heard_before == list(signals.STATUS)


def test_what_comes_after_nested_blocks_is_a_repetition_too(heard_before: list[int]) -> None:
    def work() -> None:
        with signals.raised(), signals.handled(lambda number, _: None, signals.STATUS):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)

    work()
    assert heard_before == []


def test_a_process_that_has_gone_on_for_a_minute_hears_its_own_handlers(
    heard_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook does, in which the cell with the run was told to stop."""
    requests = StopRequests()
    with requests.handled(), requests.deferred():
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert heard_before == []
    monkeypatch.setattr(signals, "_ENDING", 0.0)
    signal.raise_signal(signal.SIGHUP)
    assert heard_before == [signal.SIGHUP]


def test_a_trial_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ONE", 0.0)
    monkeypatch.setattr(signals, "_told", signals._Told())
    requests = signals.Requests()
    assert [requests.is_new(signal.SIGTERM) for _ in range(2)] == [True, True]
    signals.hear_once()
    assert not requests.is_new(signal.SIGTERM)


@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGINT])
def test_a_forked_process_ends_when_it_is_told_to(last: signal.Signals) -> None:
    """As those of a pool that a loop's body has: who ends the pool waits for them."""
    requests = StopRequests()
    with requests.handled(), requests.deferred():
        child = os.fork()
        if child == 0:
            for number in (signal.SIGINT, signal.SIGHUP, last):
                signal.raise_signal(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -last
        assert requests.requested is None


def test_what_a_loop_left_is_saved_before_a_request_is_answered() -> None:
    requests, saved = StopRequests(), []

    def save() -> None:
        with requests.postponed():
            signal.raise_signal(signal.SIGTERM)
            saved.append(1)

    with pytest.raises(Stopped):
        save()
    save()  # it was asked before, and has gone on all the same
    assert saved == [1, 1]


def test_a_wait_that_is_cut_short_has_an_end_like_any_other() -> None:
    waited = []
    for number in signals.STATUS:
        with signals.cut_short():
            signal.raise_signal(number)
            waited.append(number)
    assert waited == []


_ENDS = """
import os, signal
from stoker import signals

class Last:
    def __del__(self):  # when Python has forgotten its handlers
        os.kill(os.getpid(), signal.SIGTERM)

last = Last()
with signals.raised():
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_script_that_ends_as_told_is_not_killed_by_a_repetition_at_its_last_moment() -> None:
    assert subprocess.run([sys.executable, "-c", _ENDS], check=False).returncode == 75


_NEVER_ENDS = """
import threading, time
from stoker import signals, threads

signals._ONE = 0.0
threading.Thread(target=time.sleep, args=(600,)).start()
threads.end_process(3)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_done_can_be_ended_though_a_thread_goes_on(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", _NEVER_ENDS]) as process:
        until(lambda: handles(process.pid, signal.SIGTERM), process)
        process.send_signal(number)  # for which a thread is not cut short
        until(lambda: not pending(process.pid, number), process)
        until(lambda: process.send_signal(number) or process.poll() is not None)
        assert process.returncode == 3


def test_cleanup_is_not_cut_short_by_what_repeats_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def work() -> None:
        with signals.raised():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGUSR1)
                cleaned.append("half")
                monkeypatch.setattr(signals, "_ONE", 0.0)
                signal.raise_signal(signal.SIGTERM)
                cleaned.append("whole")

    with pytest.raises(Stopped):
        work()
    assert cleaned == ["half"]
