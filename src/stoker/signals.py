"""Signals and the processes that a process starts."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from stoker.errors import EXIT_PREEMPTED, Stopped

_PR_SET_PDEATHSIG = 1
ENDED_BY = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends, and to all processes at once."""

_CLEANED = "ignore:resource_tracker:UserWarning"  # semaphores of ranks that were killed are removed by then


def start_forkserver() -> None:
    """Start multiprocessing's server of processes; it and those that it forks hold SIGTERM and SIGUSR1 back.

    Those that only serve the one that trains must not die of it before that one has taken its
    checkpoint; they end when it does. One that comes here meanwhile is answered at the end: were it
    ignored for as long, it would be lost.
    """
    from multiprocessing import forkserver, resource_tracker  # not before the first signal can be answered

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
    sys.warnoptions.append(_CLEANED)
    try:
        resource_tracker.ensure_running()  # which lets SIGTERM through when it is done
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
        forkserver.ensure_running()
    finally:
        sys.warnoptions.remove(_CLEANED)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take() -> None:
    """From now on this process, which may have been started so, gets them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDED_BY)


def end_with_parent() -> None:
    """End this process once the one that asked for it is gone. Its parent by process id is the forkserver."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def at_parents_death(number: int) -> Callable[[], None] | None:
    """What gets the process that calls it a signal once its parent is gone, however that ended.

    It outlives exec. By prctl(2), so None elsewhere than on Linux. It is looked up here, and is one system
    call then, so that a process may make it between fork and exec.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, number)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within this block they raise Stopped, so that what was begun is taken back. In the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("preempted")

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in ENDED_BY} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer_while_starting() -> None:
    """Until a training answers them, they end this process with the exit code of a preemption.

    What this process answers in a way of its own already stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDED_BY:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """At once: an exception is lost where it meets a callback of the imports that are under way."""
    os.write(2, b"stoker: told to stop while nothing was there to be saved\n")
    os._exit(EXIT_PREEMPTED)
