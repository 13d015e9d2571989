"""Being told to stop: SIGTERM and SIGUSR1 (a scheduler wants the machine back), Ctrl-C, the clock, a search.

While a training loop runs, the request is kept and answered at the next step boundary,
after a checkpoint. Anywhere else there is nothing to finish, and it is answered at once, as
a second signal is.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stoker import terminal
from stoker.errors import Stopped

STATUS: dict[int, str] = {
    signal.SIGTERM: "preempted", signal.SIGUSR1: "preempted", signal.SIGINT: "interrupted"
}  # fmt: skip
_ONE = (
    1.0  # seconds within which a scheduler's signals are one: it sends to every process, and so may a parent
)


class StopRequests:
    """Turns signals, and a deadline, into a status which the loop asks for at its boundaries."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        """When to stop, by the machine's monotonic clock."""
        self.at_once = False
        """Told so twice."""
        self._asked: str | None = None
        self._save = False
        self._at = 0.0
        self._in_loop = False
        self._installed = False

    def ask(self, status: str) -> None:
        """Stop at the next step boundary, where a loop knows one, else here. Raises Stopped.

        Args:
            status: of the run then: paused (after a checkpoint, to go on later) or stopped (for good).
        """
        if self._asked is None:
            self._asked = status
        if not self._in_loop:
            raise Stopped(self._asked)

    def ask_to_save(self) -> None:
        """Take a checkpoint at the next step boundary, and go on."""
        self._save = True

    def told_to_save(self) -> bool:
        """Whether a checkpoint was asked for; once for each time."""
        told, self._save = self._save, False
        return told

    @property
    def requested(self) -> str | None:
        """What the run's status will be: preempted, interrupted, paused, stopped, or None."""
        if self._asked is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self._asked = "preempted"
        return self._asked

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Answer signals within this block; may be nested. Outside the main thread nothing is handled."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {s: signal.signal(s, self._receive) for s in STATUS}
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep requests for the next step boundary within this block; an error that leaves it comes first."""
        with self.handled():
            self._in_loop = True
            try:
                yield
            except GeneratorExit:  # a loop that was left by `break`: there is no boundary any more
                self._in_loop = False
                raise
            self._in_loop = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self._asked is None
        if not first and not is_another(number, self._at):
            return
        self._at = time.monotonic()
        self._asked = STATUS[number]
        if not first:
            self.at_once = True
            if number == signal.SIGINT:
                terminal.say("\nstopped at once; the same command goes on from the newest checkpoint\n")
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(self._asked)
        if not self._in_loop:
            raise Stopped(self._asked)
        if number == signal.SIGINT:
            terminal.say("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")


def is_another(number: int, before: float) -> bool:
    """Whether a signal is one more than that of a time on the machine's monotonic clock; Ctrl-C always is."""
    return number == signal.SIGINT or time.monotonic() - before >= _ONE
