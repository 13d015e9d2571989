"""Requests to stop: signals, a deadline, a search.

SIGTERM and SIGUSR1 mean that a scheduler wants the machine back; SIGHUP, that the terminal was closed.

While a training loop runs, it stops at the next step boundary, after a checkpoint. Elsewhere the process
stops at once, and so it does at a second signal.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from stoker import signals, terminal
from stoker.errors import Stopped
from stoker.signals import STATUS
from stoker.status import PREEMPTED


class StopRequests:
    """Turns signals and a deadline into a status that the loop checks at step boundaries."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        """When to stop, by the machine's monotonic clock."""
        self.at_once = False
        """Whether a second signal has arrived."""
        self._asked: str | None = None
        self._save = False
        self._signals = signals.Requests()
        self._in_loop = False
        self._installed = False

    def ask(self, status: str) -> None:
        """Stop at the next step boundary of a running loop. Without one, raises Stopped at once.

        Args:
            status: the run's status: paused (after a checkpoint, to be continued) or stopped (for good).
        """
        if self._asked is None:
            self._asked = status
        if not self._in_loop:
            raise Stopped(self._asked)

    def ask_to_save(self) -> None:
        """Request a checkpoint at the next step boundary, after which training continues."""
        self._save = True

    def told_to_save(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        told, self._save = self._save, False
        return told

    @property
    def in_loop(self) -> bool:
        """Whether a loop is running, which answers requests at its step boundaries."""
        return self._in_loop

    @property
    def requested(self) -> str | None:
        """The run's status after the requested stop: preempted, interrupted, paused or stopped; else None."""
        if self._asked is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self._asked = PREEMPTED
        return self._asked

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals within this block; may be nested. Outside the main thread it has no effect."""
        if self._installed:
            yield
            return
        with signals.handled(self._receive, STATUS) as installed:
            self._installed = installed
            try:
                yield
            finally:
                self._installed = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block, keep requests for the next step boundary; an exception takes precedence."""
        with self.handled():
            self._in_loop = True
            try:
                yield
            except GeneratorExit:  # the loop was left with `break`, so there is no next step boundary
                self._in_loop = False
                raise
            self._in_loop = False

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Within this block, keep requests for its end, where they raise Stopped; not those from before."""
        before = self._asked
        with self.deferred():
            yield
        if before is None and self._asked is not None:
            raise Stopped(self._asked)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._signals.is_new(number):
            return
        if self._signals.count > 1:
            self._asked, self.at_once = STATUS[number], True
            if number == signal.SIGINT:
                terminal.say("\nstopped at once; the same command resumes from the newest checkpoint\n")
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(self._asked)
        if self._asked is None:  # otherwise a deadline or a search asked first
            self._asked = STATUS[number]
            if not self._in_loop:
                raise Stopped(self._asked)
        if number == signal.SIGINT:
            terminal.say(
                "\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once\n"
            )
