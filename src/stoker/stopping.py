"""Being told to stop: SIGTERM (a scheduler wants the machine back) and Ctrl-C.

While a training loop runs, the request is kept and answered at the next step boundary,
after a checkpoint. Anywhere else there is nothing to finish, and it is answered at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stoker.errors import Stopped

_STATUS = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}


class StopRequests:
    """Turns signals into a `requested` status, which the loop asks for at its boundaries."""

    def __init__(self) -> None:
        self.requested: str | None = None
        """What the run's status will be: preempted, interrupted, or None."""
        self._in_loop = False
        self._installed = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Answer signals within this block; may be nested. Outside the main thread nothing is handled."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[signal.Signals, Any] = {s: signal.signal(s, self._receive) for s in _STATUS}
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep requests for the next step boundary within this block."""
        with self.handled():
            self._in_loop = True
            try:
                yield
            finally:
                self._in_loop = False

    def raise_if_requested(self) -> None:
        """Raises Stopped where a stop was requested."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        self.requested = _STATUS[signal.Signals(number)]
        if not self._in_loop:
            raise Stopped(self.requested)
        if number == signal.SIGINT:
            sys.stderr.write("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
