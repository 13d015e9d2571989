"""The uploader: a separate process that uploads a run to its object store while it is trained.

Training never waits for a slow store. The uploader ends when the trainer has ended and everything is
uploaded; if it is killed, the next one continues.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from stoker import signals, storage
from stoker.periodic import backoff
from stoker.run import messages, mirror, view
from stoker.run.directory import MANIFEST, RunDirectory, step_of
from stoker.run.mirror import Lost, Mirror
from stoker.status import KILLED

log = logging.getLogger("stoker")

INTERVAL = 2.0  # seconds between checks for new data
TRY = 3.0  # seconds to keep trying one request before reporting that the store does not answer
_TRIES = 4
LONGEST_BACKOFF = 30.0  # seconds between tries while the store does not answer
PATIENCE = 600.0  # seconds to keep trying such a store once the trainer has ended
ONCE_PATIENCE = 10.0  # the same for `stoker sync`, where the user waits
FINISH_PATIENCE = 600.0  # seconds that a run that has ended waits for such a store ...
STOP_PATIENCE = 20.0  # ... and one that was told to stop: torchrun, Slurm and Kubernetes kill after 30
SAY = 30.0  # seconds between messages while a command waits for an upload
BEHIND = 3  # checkpoints that the store lacks ...
BEHIND_FOR = 60.0  # ... and seconds since the first of them was made, after which it is said
LAST_WORDS = 3.0  # seconds for the other ranks to notice that one was killed, and to log it


@dataclass(frozen=True)
class State:
    """The state of a run's upload, as reported by the uploader."""

    pid: int = 0
    checkpoint: int | None = None
    """The step of the newest checkpoint in the store."""
    behind: bool = True
    """Whether the store may lack something that exists here."""
    error: str = ""
    since: float = 0.0
    """When the store stopped answering, in seconds since 1970; 0 if it answers."""
    at: float = 0.0
    """When this was reported, in seconds since 1970."""


class Uploads:
    """Keeps an uploader running for the training process.

    Args:
        run: the run.
        copy: its copy in an object store; if None, the methods do nothing.
    """

    def __init__(self, run: RunDirectory, copy: Mirror | None) -> None:
        self._run, self._copy = run, copy
        self._process: subprocess.Popen[bytes] | None = None
        self._warned = False
        self.whole = True
        """After `finish`: whether the store has all of the run, if there is a store."""
        self._lacking: dict[int, float] = {}
        """Steps of the checkpoints that were made and that the store lacks, with the time they were seen."""
        self._warned_behind = False

    def begin(self) -> None:
        """Start an uploader if none is running; called when there is something to upload."""
        if self._copy is not None and not working(self._run):
            self._process = spawn(self._run)

    def look_after(self) -> None:
        """Restart the uploader if it has ended; warn when the store stops answering."""
        if self._copy is None:
            return
        if self._process is None or self._process.poll() is not None:
            self.begin()
        said = state(self._run)
        self._warn_if_behind(said)
        error = said.error
        if error and not self._warned:
            log.warning(
                "cannot upload to %s now (%s); training continues, checkpoints are kept in %s and uploaded "
                "later", self._copy.where, error, self._run.checkpoints,
            )  # fmt: skip
        elif self._warned and not error:
            log.info("uploads to %s work again", self._copy.where)
        self._warned = bool(error)

    def _warn_if_behind(self, said: State) -> None:
        """Say once that the store's newest checkpoint is several behind, as deleted ones count too."""
        newest = -1 if said.checkpoint is None else said.checkpoint
        made = {step_of(file.parent.name) for file in self._run.checkpoints.glob(f"*/{MANIFEST}")}
        now = time.monotonic()
        known = {**dict.fromkeys(made, now), **self._lacking}
        self._lacking = {step: seen for step, seen in known.items() if step > newest}
        since = min(self._lacking.values(), default=now)
        if self._warned_behind or len(self._lacking) < BEHIND or now - since < BEHIND_FOR or said.error:
            return
        self._warned_behind = True
        has = "no checkpoint yet" if newest < 0 else f"as its newest checkpoint that of step {newest}"
        log.warning(
            "%s has %s, and %d were made since: uploads are slower than checkpoints are made, so a machine "
            "that is lost costs more; raise checkpoint_every", self._copy and self._copy.where, has,
            len(self._lacking),
        )  # fmt: skip

    def finish(self, stopping: Callable[[], bool]) -> None:
        """Wait until all is uploaded or the store fails for too long. Call after releasing the run's lock.

        Args:
            stopping: whether the process was told to stop, and so waits only for `STOP_PATIENCE`.
        """
        if self._copy is None:
            return
        later = "; without time for it, the next start here or `stoker sync` does" if stopping() else ""
        log.info("uploading the rest to %s%s", self._copy.where, later)
        said = wait(self._run, lambda: STOP_PATIENCE if stopping() else FINISH_PATIENCE)
        self.whole = not said.behind
        if said.behind:
            log.warning("%s", lacking(self._run, self._copy, said))


def lacking(run: RunDirectory, copy: Mirror, said: State) -> str:
    """What to say of a run that has ended and is not uploaded completely."""
    return (
        f"{copy.where} does not have all of this run ({said.error}); the run is kept in {run.path}, and its "
        "next start or `stoker sync` uploads the rest"
    )


def spawn(run: RunDirectory, *, once: bool = False) -> subprocess.Popen[bytes]:
    """Start the uploader of a run; with `once`, it uploads what exists now and ends."""
    flags = ["--once"] if once else []
    log = run.logs / "uploader.log"
    return signals.start_service("stoker.run.uploader", *flags, str(run.path.absolute()), log=log)


def state(run: RunDirectory) -> State:
    """The state of a run's upload that its uploader reported last."""
    try:
        return State(**storage.read_json(run.path / "store.json"))
    except TypeError:
        return State()


def working(run: RunDirectory) -> bool:
    """Whether an uploader of the run is running."""
    return storage.is_locked(_turn(run))


def wait(run: RunDirectory, patience: Callable[[], float]) -> State:
    """Wait until a run that is not being trained is uploaded completely; starts an uploader if needed.

    Args:
        patience: seconds to wait for a store that does not answer; asked again and again.
    """
    begun = said_at = time.time()
    _wake(run).touch()  # an uploader that pauses after a failure tries again now
    tries = 0
    while True:
        said = state(run)
        if time.time() - said_at > SAY:
            said_at = time.time()
            log.info("still uploading%s", f"; the last try failed: {said.error}" if said.error else "")
        tired = said.error and said.at >= begun and time.time() - max(said.since, begun) > patience()
        if working(run):
            if tired:
                return said
            time.sleep(0.05)
            continue
        said = state(run)
        over = tired or not said.since  # else the store does not answer, which may pass
        if said.at >= begun and (not said.behind or (said.error and over)):
            return said
        tries += not said.error
        if tries > _TRIES:
            return said
        spawn(run, once=True).wait()  # returns at once if another one has just started


class Source(Protocol):
    """What is uploaded while it grows: a run, or the logs of a job."""

    @property
    def path(self) -> Path:
        """Its local folder, where the uploader writes its state."""

    @property
    def trained_here(self) -> bool:
        """Whether it still grows."""

    def exists(self) -> bool:
        """Whether there is anything to upload."""


class Copy(Protocol):
    """The copy of a `Source` in the store."""

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint in the store."""

    def push(self) -> None:
        """Upload what is new here. Raises Unreachable; Lost if another machine has taken over."""

    def forget(self) -> None:
        """Forget what the store was known to contain, and list it again."""


def upload(run: Source, copy: Copy, *, once: bool = False) -> bool:
    """Upload a run until its trainer has ended and everything is uploaded; returns whether that is so."""
    failing_since = alone_since = 0.0
    failures = 0
    patience = ONCE_PATIENCE if once else PATIENCE
    while run.exists():
        alive = run.trained_here and not once  # checked first: data read after its end is complete
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
        _pause(run, backoff(failures, INTERVAL, LONGEST_BACKOFF), alive)
    return False


def _pause(run: Source, seconds: float, alive: bool) -> None:
    """Sleep until the time is up, the trainer ends or a process touches the wake file."""
    deadline, asked = time.monotonic() + seconds, storage.modified(_wake(run))
    while time.monotonic() < deadline and storage.modified(_wake(run)) == asked:
        if alive and not run.trained_here:
            break
        time.sleep(0.1)


def _wake(run: Source) -> Path:
    """The file that a process touches when it waits for the uploader."""
    return run.path / "store.wake"


def _turn(run: RunDirectory) -> Path:
    """The file that the uploader of a run locks."""
    return run.path / "store.lock"


def _say(run: Source, said: State) -> None:
    with contextlib.suppress(OSError):
        storage.write_json(run.path / "store.json", {**asdict(said), "at": time.time()})


def main() -> int:
    """The uploader process. Returns 0 if everything was uploaded, else 1."""
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
        for number in signals.ENDED_BY:
            signal.signal(number, signal.SIG_IGN)
    lock = storage.try_lock(_turn(run))
    if lock is None:  # another uploader is running
        return 0
    whole = upload(run, copy, once=arguments.once)
    if whole and not arguments.once and view.load(run).status == KILLED:
        time.sleep(LAST_WORDS)
        whole = upload(run, copy, once=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
