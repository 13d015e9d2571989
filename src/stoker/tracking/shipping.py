"""The training process's part in shipping: it keeps a follower running for its sinks."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Sequence

from stoker.run.directory import RunDirectory
from stoker.tracking import follower
from stoker.tracking.follower import SinkState

log = logging.getLogger("stoker")

_PAUSE = 30.0  # least number of seconds between two starts of a follower


class Shipping:
    """The follower of one run.

    Args:
        run: the run.
        sinks: the names of its sinks; if there are none, every method does nothing.
    """

    def __init__(self, run: RunDirectory, sinks: Sequence[str]) -> None:
        self._run, self._sinks = run, sinks
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self._warned: set[str] = set()

    def begin(self) -> None:
        """Start a follower."""
        if self._sinks:
            self._process, self._begun = follower.spawn(self._run), time.monotonic()

    def look_after(self) -> None:
        """Restart the follower if it has ended; log a warning once for each sink that fails."""
        self._look(_PAUSE)

    def finish(self) -> None:
        """Make sure, before the run ends, that a follower ships the rest."""
        self._look(0.0)

    def wait(self, timeout: float) -> list[SinkState]:
        """Wait at most `timeout` seconds for the follower of a closed run; returns each sink's state."""
        return follower.wait(self._run, self._process, timeout) if self._process is not None else []

    def _look(self, pause: float) -> None:
        if self._process is None:
            return
        if self._process.poll() is not None and time.monotonic() - self._begun >= pause:
            log.info("the process that ships to the sinks is gone: starting another one")
            self.begin()
        self._warn()

    def _warn(self) -> None:
        for name, error in follower.failing(self._run).items():
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "cannot ship to %s now (%s); training continues, and `stoker sync %s` or the next "
                    "start ships the rest", name, error, self._run.id,
                )  # fmt: skip
