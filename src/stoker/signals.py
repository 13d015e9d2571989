"""Signals and the processes that a process starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def ignored_by_what_starts_here() -> Iterator[None]:
    """Processes that are started within this block ignore SIGTERM and SIGUSR1, and what they fork does.

    A scheduler signals all processes at once. Those that only serve the one that trains must not
    die of it before that one has taken its checkpoint; they end when it does.
    """
    if threading.current_thread() is not threading.main_thread():  # who alone may set handlers
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
