"""The part in shipping of a process that trains or searches: it keeps a follower running for its sinks."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stoker import threads
from stoker.run import finding
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, ledger, store, sweep_follower
from stoker.tracking.follower import SinkState

log = logging.getLogger("stoker")

_ANSWER_TIMEOUT = 1.5  # seconds
_PAUSE = 30.0  # least number of seconds between two starts of a follower


class _Shipping:
    """A follower, which is restarted if it ends too soon.

    Args:
        spawn: starts it.
        sinks: the names of its sinks; if there are none, every method does nothing.
    """

    def __init__(self, spawn: Callable[[], subprocess.Popen[bytes]], sinks: Sequence[str]) -> None:
        self._spawn, self._sinks = spawn, sinks
        self._warned: set[str] = set()
        self._rest = "the search continues, and the rest is shipped later"
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0

    def begin(self) -> None:
        """Start a follower."""
        if "mlflow" in self._sinks and (reason := store.unusable()) is not None:
            self._warn_once("mlflow", reason, self._rest)
        if self._sinks:
            self._process, self._begun = self._spawn(), time.monotonic()

    def look_after(self) -> None:
        """Restart the follower if it has ended."""
        self._look(_PAUSE)

    def finish(self) -> None:
        """Make sure, before the run or the search ends, that a follower ships the rest."""
        self._look(0.0)

    def _look(self, pause: float) -> None:
        if self._process is None or self._process.poll() is None:
            return
        if time.monotonic() - self._begun >= pause:
            log.info("the process that ships to the sinks is gone: starting another one")
            self.begin()

    def _warn_once(self, name: str, error: str, rest: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("cannot ship to %s now (%s); %s", name, error, rest)


class Shipping(_Shipping):
    """The follower of one run. A warning is logged once for each sink that fails."""

    def __init__(self, run: RunDirectory, sinks: Sequence[str]) -> None:
        super().__init__(lambda: follower.spawn(run), sinks)
        self._run = run
        self._sync = f"stoker sync {run.id}{finding.option(run.runs)}"
        self._rest = f"training continues, and `{self._sync}` or the next start ships the rest"

    def say_if_unanswered(self) -> None:
        """Say so if MLflow has nothing of a run that has ended, and its server does not answer.

        A short run ends before its follower has found that out. Looking up the server's name has no time
        limit of its own: whatever is not known after a moment is not said.
        """
        if self._process is None or "mlflow" not in self._sinks:
            return
        if ledger.load(ledger.file_of(self._run, "mlflow")).offsets:
            return
        asked = threads.begun(store.unanswered, "reach-mlflow")
        with contextlib.suppress(TimeoutError):
            reason = asked.result(_ANSWER_TIMEOUT)
            if reason is not None:
                self._warn_once("mlflow", reason, f"`{self._sync}` ships it later")

    def wait(self, timeout: float) -> list[SinkState]:
        """Wait at most `timeout` seconds for the follower of a closed run; returns each sink's state."""
        return follower.wait(self._run, self._process, timeout) if self._process is not None else []

    def _look(self, pause: float) -> None:
        super()._look(pause)
        if self._process is not None:
            self._warn()

    def _warn(self) -> None:
        for name, error in follower.failing(self._run).items():
            self._warn_once(name, error, self._rest)


class SweepShipping(_Shipping):
    """The follower that ships all trials of a search. A warning is logged once for each sink that fails.

    Args:
        folder: the search's.
    """

    def __init__(self, folder: Path, sinks: Sequence[str]) -> None:
        super().__init__(lambda: sweep_follower.spawn(folder), sinks)
        self._folder = folder

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds after the search; returns whether everything was shipped."""
        if self._process is None:
            return True
        deadline = time.monotonic() + timeout
        try:
            if self._process.wait(timeout) < 0:  # killed, maybe so late that `finish` did not see it
                self.begin()
            return self._process.wait(max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            return False

    def _look(self, pause: float) -> None:
        super()._look(pause)
        if self._process is not None:
            for name, error in sweep_follower.failing_in(self._folder).items():
                self._warn_once(name, error, self._rest)
