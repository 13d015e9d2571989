"""Signals and the processes that a process starts."""

from __future__ import annotations

import signal
from multiprocessing import forkserver, resource_tracker

ENDED_BY = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends, and to all processes at once."""


def start_forkserver() -> None:
    """Start multiprocessing's server of processes; it and those that it forks hold SIGTERM and SIGUSR1 back.

    Those that only serve the one that trains must not die of it before that one has taken its
    checkpoint; they end when it does. One that comes here meanwhile is answered at the end: were it
    ignored for as long, it would be lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
    try:
        resource_tracker.ensure_running()  # which lets SIGTERM through when it is done
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take() -> None:
    """From now on this process, which may have been started so, gets them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDED_BY)
