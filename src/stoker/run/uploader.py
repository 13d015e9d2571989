"""The uploader: a process of its own that brings a run to its object store while it is trained.

Training never waits for a store that is slow. The uploader ends when the trainer is gone and everything
is there; where it is killed, the next one goes on.

    python -m stoker.run.uploader [--once] RUN_DIRECTORY
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from stoker import storage
from stoker.run import messages, mirror, view
from stoker.run.directory import RunDirectory
from stoker.run.mirror import Lost, Mirror

log = logging.getLogger("stoker")

INTERVAL = 2.0  # seconds between looks at what is new
TRY = 3.0  # seconds that one request is tried for, before it is said that the store does not answer
_TRIES = 4
LONGEST_BACKOFF = 30.0  # seconds between tries of a store that does not answer
PATIENCE = 600.0  # seconds that such a store is tried for once the trainer is gone
ONCE_PATIENCE = 10.0  # and by `stoker sync`, where somebody waits for the answer
FINISH_PATIENCE = 30.0  # and that a run waits for it which has ended
LAST_WORDS = 3.0  # seconds in which the other ranks notice that one was killed, and say so in their logs


@dataclass(frozen=True)
class State:
    """How far a run's copy is, as the uploader says."""

    pid: int = 0
    checkpoint: int | None = None
    """The newest one in the store."""
    behind: bool = True
    """Whether something that is here is not there."""
    error: str = ""
    since: float = 0.0
    """Since when the store does not answer, in seconds since 1970; 0 where it does."""
    at: float = 0.0
    """When the uploader said so, in seconds since 1970."""


class Uploads:
    """What the process that trains does for the copy of its run: it sees to it that there is an uploader.

    Args:
        run: the run.
        copy: its copy in an object store, or None where it is in none; then all of this does nothing.
    """

    def __init__(self, run: RunDirectory, copy: Mirror | None) -> None:
        self._run, self._copy = run, copy
        self._process: subprocess.Popen[bytes] | None = None
        self._warned = False

    def begin(self) -> None:
        """There is something to bring: start an uploader where there is none."""
        if self._copy is not None and not working(self._run):
            self._process = spawn(self._run)

    def look_after(self) -> None:
        """Start an uploader where the last one is gone; say when the store stops answering."""
        if self._copy is None:
            return
        if self._process is None or self._process.poll() is not None:
            self.begin()
        error = state(self._run).error
        if error and not self._warned:
            log.warning(
                "cannot upload to %s now (%s); training continues, checkpoints are kept in %s and uploaded "
                "later", self._copy.where, error, self._run.checkpoints,
            )  # fmt: skip
        elif self._warned and not error:
            log.info("uploads to %s work again", self._copy.where)
        self._warned = bool(error)

    def finish(self) -> None:
        """Once the run has let go of its lock: wait until all is there, or the store is away for too long."""
        if self._copy is None:
            return
        log.info("uploading the rest to %s", self._copy.where)
        said = wait(self._run, FINISH_PATIENCE)
        if said.behind:
            log.warning(
                "%s does not have all of this run (%s); the run is kept in %s, and its next start or "
                "`stoker sync` uploads the rest", self._copy.where, said.error, self._run.path,
            )  # fmt: skip


def spawn(run: RunDirectory, *, once: bool = False) -> subprocess.Popen[bytes]:
    """Start the uploader of a run; `once`: one that brings to the store what is here now, and ends."""
    command = [sys.executable, "-P", "-m", "stoker.run.uploader", *(["--once"] if once else [])]
    with (run.logs / "uploader.log").open("ab") as output:
        return subprocess.Popen(
            [*command, str(run.path.absolute())], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # Ctrl-C in the terminal is meant for the trainer
        )  # fmt: skip


def state(run: RunDirectory) -> State:
    """How far a run's copy is, as its uploader said last."""
    try:
        return State(**storage.read_json(run.path / "store.json"))
    except TypeError:
        return State()


def working(run: RunDirectory) -> bool:
    """Whether a run has an uploader now."""
    return storage.is_locked(_turn(run))


def wait(run: RunDirectory, patience: float) -> State:
    """Wait until all of a run that nobody trains is in its store; starts an uploader where there is none.

    Args:
        patience: seconds that a store which does not answer is waited for.
    """
    begun = time.time()
    _wake(run).touch()  # one that pauses after a failure is to try now
    for _ in range(_TRIES):
        while working(run):
            said = state(run)
            if said.error and said.at >= begun and time.time() - said.since > patience:
                return said
            time.sleep(0.05)
        said = state(run)
        if said.at >= begun and (said.error or not said.behind):
            return said
        spawn(run, once=True).wait()  # at once, where another one has just come up
    return state(run)


class Source(Protocol):
    """What is brought to a store while it grows: a run, or the logs of a job."""

    @property
    def path(self) -> Path:
        """Its folder here, where the uploader says how far it is."""

    @property
    def trained_here(self) -> bool:
        """Whether it grows still."""

    def exists(self) -> bool:
        """Whether there is anything to bring."""


class Copy(Protocol):
    """What of it is in the store."""

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint there."""

    def push(self) -> None:
        """Bring there what is new here. Raises Unreachable; Lost where that is not for this machine to do."""

    def forget(self) -> None:
        """Look again at what is there."""


def upload(run: Source, copy: Copy, *, once: bool = False) -> bool:
    """Bring a run to its store until its trainer is gone and all is there; whether all is."""
    failing_since = alone_since = 0.0
    failures = 0
    patience = ONCE_PATIENCE if once else PATIENCE
    while run.exists():
        alive = run.trained_here and not once  # asked first: what is read after its death is all
        alone_since = 0.0 if alive else alone_since or time.monotonic()
        try:
            copy.push()
            failures, failing_since = 0, 0.0
            _say(run, State(os.getpid(), copy.newest, behind=alive))
            if not alive:
                return True
        except Lost as error:
            log.warning("%s", error)
            _say(run, State(os.getpid(), copy.newest, True, str(error), failing_since))
            return False
        except Exception as error:
            copy.forget()
            failures += 1
            failing_since = failing_since or time.time()
            log.warning("%s: %s", type(error).__name__, error)
            _say(run, State(os.getpid(), copy.newest, True, str(error), failing_since))
            if not alive and time.monotonic() - alone_since > patience:
                return False
        _pause(run, min(INTERVAL * 2**failures, LONGEST_BACKOFF), alive)
    return False


def _pause(run: Source, seconds: float, alive: bool) -> None:
    """Sleep, unless the trainer ends, or somebody waits."""
    deadline, asked = time.monotonic() + seconds, storage.modified(_wake(run))
    while time.monotonic() < deadline and storage.modified(_wake(run)) == asked:
        if alive and not run.trained_here:
            break
        time.sleep(0.1)


def _wake(run: Source) -> Path:
    """Touched by somebody who waits for the uploader."""
    return run.path / "store.wake"


def _turn(run: RunDirectory) -> Path:
    """Locked by the uploader of a run."""
    return run.path / "store.lock"


def _say(run: Source, said: State) -> None:
    with contextlib.suppress(OSError):
        storage.write_json(run.path / "store.json", {**asdict(said), "at": time.time()})


def main() -> int:
    """The uploader's process. Returns 0 where all is in the store, else 1."""
    parser = argparse.ArgumentParser(prog="stoker.run.uploader")
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--once", action="store_true", help="upload what is here now, then exit")
    arguments = parser.parse_args()
    os.nice(19)  # training comes first
    messages.write_to_stderr()
    run = RunDirectory(arguments.run)
    copy = mirror.of(run, patience=TRY)
    if copy is None:
        raise SystemExit(f"{run.path} does not belong to an object store")
    if not arguments.once:  # a scheduler signals all processes of a job; this one ends after the trainer
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    lock = storage.try_lock(_turn(run))
    if lock is None:  # another one does it
        return 0
    whole = upload(run, copy, once=arguments.once)
    if whole and not arguments.once and view.load(run).status == view.KILLED:
        time.sleep(LAST_WORDS)
        whole = upload(run, copy, once=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
