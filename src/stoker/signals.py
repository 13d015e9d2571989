"""Signals, and the processes that receive them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from stoker import supervision
from stoker.errors import STOP_CODES, Stopped
from stoker.status import INTERRUPTED, PREEMPTED

_PR_SET_PDEATHSIG = 1
ENDED_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""The signals with which a scheduler, or a terminal that is closed, stops all processes of a job at once."""
STATUS: dict[int, str] = {
    signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED,
    signal.SIGINT: INTERRUPTED, signal.SIGHUP: INTERRUPTED,
}  # fmt: skip
"""The status of a run that a signal has stopped."""

_ENDING = 60.0  # seconds after the request to end within which a process may still be about to
_ONE = 1.0  # seconds within which signals count as one: a scheduler signals every process, a parent its child


def start_service(module: str, *words: str, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE WORDS` as a process that serves this one; its output is added to a file.

    It is of a session of its own: Ctrl-C in the terminal is meant for the process that trains.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words], stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip


def take() -> None:
    """Unblock `ENDED_BY` in this process, which the forkserver may have forked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDED_BY)


def end_with_parent() -> None:
    """End this process when the one that requested it has ended. Its parent by pid is the forkserver."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def at_parents_death(number: int) -> Callable[[], None] | None:
    """A function that makes its caller receive a signal when the caller's parent ends, for whatever reason.

    The setting survives exec. It uses prctl(2), so this returns None on systems other than Linux. The
    returned function is a single system call, so it is safe between fork and exec.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, number)


Handler: TypeAlias = Callable[[int, FrameType | None], object]


@dataclass
class _Told:
    """Whether this process was told to end by one of `ENDED_BY`."""

    at: float = -math.inf
    """When, by the machine's monotonic clock."""
    once: bool = False
    """See `hear_once`."""


_told = _Told()


@dataclass
class Requests:
    """Counts the requests to stop that a process receives; several signals can be one request."""

    count: int = 0
    _at: float = -math.inf

    def is_new(self, number: int) -> bool:
        """Count a signal, unless it repeats the request before it. Returns whether it was counted.

        Ctrl-C never repeats one, and SIGHUP always does: when a terminal is closed, its shell sends one, and
        the kernel another once the shell has ended, which may be seconds later.

        A launcher passes on to its ranks what a scheduler may have sent to them too, and on a busy machine
        it may do so late: whether a rank is told a second time is for its launcher to say.
        """
        now = time.monotonic()
        if self.count and not self._is_another(number, now):
            return False
        self.count += 1  # nothing is called since the look at it, so no other signal is handled in between
        self._at = now
        return True

    def _is_another(self, number: int, now: float) -> bool:
        told_twice = False if _told.once else supervision.told_twice()
        if told_twice is not None:
            return told_twice
        return number == signal.SIGINT or (number != signal.SIGHUP and now - self._at >= _ONE)


@contextlib.contextmanager
def handled(handler: Handler, numbers: Iterable[int]) -> Iterator[bool]:
    """Handle signals by a function within this block.

    Once one of `ENDED_BY` was handled, the same request may still come from elsewhere when the block has
    ended: unless it is new, see `Requests`, it is ignored, so that the process ends as it was told to.

    A process that is forked within the block, as by a pool, ends by SIGTERM, with which pools end theirs, and
    by a second Ctrl-C; what a terminal or a scheduler sends to all besides is for its parent to answer.

    Yields whether it does: outside the main thread, which alone can have handlers, it has no effect.
    """
    process, interrupts = os.getpid(), 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        if os.getpid() != process:
            interrupts += number == signal.SIGINT
            if number == signal.SIGTERM or interrupts > 1:
                _give_way(number, signal.SIG_DFL)
            return
        if number in ENDED_BY:
            _told.at = time.monotonic()
        handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if main:
        _told.at = -math.inf  # who begins something is not about to end
    before = {number: signal.signal(number, receive) for number in heard(numbers)} if main else {}
    try:
        yield main
    finally:
        for number, previous in before.items():
            ending = number in ENDED_BY and _is_ending()
            signal.signal(number, _unless_repeated(previous) if ending else previous)


def keep(code: int) -> None:
    """This process ends with an exit code now, which a signal cannot change any more.

    A thread of the script's may have to finish, or never end: it is waited for until a second signal, which
    ends the process at once. Only in the main thread.
    """
    _told.at = time.monotonic()
    requests = Requests()

    def end(number: int, frame: FrameType | None) -> None:
        if requests.is_new(number) and requests.count > 1:
            os._exit(code)

    if threading.current_thread() is threading.main_thread():
        for number in heard(STATUS):
            signal.signal(number, end)


def _unless_repeated(previous: Any) -> Handler:
    """A handler that ignores what repeats the request to end, and gives way to another otherwise."""
    process, requests = os.getpid(), Requests(1, _told.at)

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process or not _is_ending() or requests.is_new(number):
            _give_way(number, previous)

    return receive


def _give_way(number: int, handler: Any) -> None:
    signal.signal(number, handler)
    signal.raise_signal(number)


def _is_ending() -> bool:
    """Whether this process has been told to end, and may be about to."""
    return time.monotonic() - _told.at < _ENDING


@atexit.register
def _ignore_repetitions() -> None:
    """While Python ends, it forgets its handlers: the same request would kill the process even then."""
    if _is_ending() and threading.current_thread() is threading.main_thread():
        for number in heard(ENDED_BY):
            signal.signal(number, signal.SIG_IGN)


def hear_once() -> None:
    """This process has a controller, which tells it once to end, and later kills it if it has to.

    What it is told besides, by a scheduler or late by a busy controller, is the same request.
    """
    _told.once = True


def unanswered() -> list[int]:
    """Those of `ENDED_BY` for which this process has no handler of its own."""
    return [number for number in ENDED_BY if signal.getsignal(number) in (signal.SIG_DFL, _end)]


def heard(numbers: Iterable[int]) -> list[int]:
    """The given signals without SIGHUP if this process was started to ignore it, as `nohup` does.

    Nor has it those that a program in which Python is embedded handles: Python could not restore that.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in numbers if signal.getsignal(n) is not None and not (n == signal.SIGHUP and ignored)]


@contextlib.contextmanager
def raised(numbers: Iterable[int] = ENDED_BY) -> Iterator[None]:
    """Within this block, signals raise Stopped, so that cleanup runs. Only in the main thread.

    What repeats the signal does not cut the cleanup short, a second signal does.
    """
    requests = Requests()

    def stop(number: int, frame: FrameType | None) -> None:
        if requests.is_new(number):
            raise Stopped(STATUS[number])

    with handled(stop, numbers):
        yield


@contextlib.contextmanager
def cut_short() -> Iterator[None]:
    """Let the signals that stop a run only end this block, which waits for what can be had later too."""
    with contextlib.suppress(Stopped), raised(STATUS):
        yield


def answer_while_starting() -> None:
    """Outside of training, `ENDED_BY` end this process with the exit code of a run that they stop.

    Handlers that the process has already installed stay.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in unanswered():
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Exit at once, because an exception could be lost in a callback of a running import."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, b"stoker: told to stop, and there was nothing to save\n")
    os._exit(STOP_CODES[STATUS[number]])
