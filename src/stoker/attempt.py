"""Run: one attempt at a run, as the code that trains sees it.

Opening one makes the run's directory, or continues it; takes its lock; records what it is
made from; and starts an attempt in the journal. After that everything is an append. The
follower that ships the journal to MLflow is started with the first metric, so that a run
which is refused before it begins leaves nothing behind. No torch is imported here.

    with stoker.Run("digits", config={"lr": 0.1}) as run:
        for step in range(100):
            run.log(loss=...)
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from stoker import config as configs
from stoker import storage
from stoker.errors import BadInput, Stopped
from stoker.reproduce import provenance
from stoker.run import artifacts, directory, journal, view
from stoker.run.deferred import Deferred, flatten
from stoker.stopping import StopRequests
from stoker.tracking import follower

log = logging.getLogger("stoker")


class Run:
    """A run being trained by this process.

    Args:
        experiment: the folder of runs that belong together.
        name: the run's id; a run of that name is continued. By default a new id is made.
        config: a dataclass, or a dict of JSON values (dotted keys), kept in `run.json`.
        runs: the folder that runs stand under; by default STOKER_RUNS, else `runs/`.
        sources: where each config value came from.
        recipe: what starts this run again: `name` and `reference`.
        seed: the seed that the run's randomness is a function of.
        code: a folder of the git repository to record; by default the working directory.
        accept_drift: continue a run although its config was another, and record what changed.

    Raises:
        BadInput: the directory cannot be written, another process trains this run, or the
            run to continue has another config.
    """

    def __init__(
        self,
        experiment: str = "default",
        name: str | None = None,
        *,
        config: Any = None,
        runs: Path | str | None = None,
        sources: Mapping[str, str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        seed: int = 0,
        code: Path | None = None,
        accept_drift: bool = False,
    ) -> None:
        folder = Path(runs if runs is not None else os.environ.get("STOKER_RUNS", "runs")).absolute()
        self.directory = directory.locate(folder, experiment, name or directory.new_id())
        self.seed = seed
        self.step = 0
        """The step that values are logged at; a Trainer moves it."""
        self.latest: dict[str, float] = {}
        """The newest value of every metric that was written."""
        self.stop = StopRequests()
        self._sinks = follower.enabled()
        self._pending: collections.deque[tuple[int, float, Deferred]] = collections.deque()
        self._used = False
        self._follower: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._lock = threading.Lock()
        record = {
            "uid": uuid.uuid4().hex,
            "id": self.directory.id,
            "experiment": self.directory.experiment,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "cwd": str(Path.cwd()),
            "recipe": dict(recipe or {}),
            "config": _config_record(config),
            "sources": dict(sources or {}),
            "seed": seed,
            "parents": [],
        }
        self._descriptor = _take(self.directory)
        try:
            self.continued = self.directory.exists()
            changes = self._open(record, code or Path.cwd(), accept_drift)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.attempt, self._journal = journal.start_attempt(self.directory.journal)
        self._logging = _log_to(self.directory.logs / "rank-0.log")
        self._append("attempt_started", pid=os.getpid(), host=platform.node(), drift=changes)
        log.debug("attempt %d of %s, process %d", self.attempt, self.directory.path, os.getpid())

    def _open(self, record: dict[str, Any], code: Path, accept_drift: bool) -> dict[str, tuple[Any, Any]]:
        """Make or continue the directory; returns what the config drifted by."""
        changes: dict[str, tuple[Any, Any]] = {}
        if self.continued:
            before = view.load(self.directory)
            shared = before.config.keys() & record["config"].keys()  # a key may be new in the code since
            refused = {k: v for k, v in configs.drift(before.config, record["config"]).items() if k in shared}
            if refused and not accept_drift:
                raise BadInput(_explain_drift(self.directory, refused))
            changes = configs.drift(before.record["config"], record["config"])
            self.step = before.step
        else:
            record["code"] = provenance.code_state(code)
            self.directory.create(record)
            provenance.write(self.directory.provenance, code, record["code"])
        return changes

    # -- what user code calls -----------------------------------------------------------

    def log(
        self, values: Mapping[str, Any] | None = None, /, *, step: int | None = None, **metrics: Any
    ) -> None:
        """Log metrics at a step (by default the current one).

        Takes numbers, one-element tensors on any device, and nested dicts of these (joined
        by "/"). A tensor on an accelerator is copied in the background and written once it
        has arrived: the device is never waited for. A metric has one point a step: the first
        one stands. Without a Trainer, every call that names no step moves to the next one.
        """
        flat = flatten({**(values or {}), **metrics})
        if "step" in flat:
            raise ValueError("'step' is where a metric is logged, not one: pass it as run.log(..., step=)")
        deferred = Deferred(flat)
        if step is None and not self._stepped_by_trainer:
            self.step += 1
        if self._sinks and self._follower is None:
            self._follower = follower.spawn(self.directory)
        self._pending.append((self.step if step is None else step, time.time(), deferred))
        self._used = True
        self._write_arrived(wait=False)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a small table of JSON values at the current step."""
        self._append("table", name=name, step=self.step, columns=list(columns), rows=[list(r) for r in rows])

    def tag(self, **tags: str) -> None:
        """Set tags; a tag set again is replaced."""
        self._append("tags", tags={key: str(value) for key, value in tags.items()})

    def fingerprint(self, name: str, value: str) -> None:
        """Record the fingerprint of something the run depends on; warns where it changed since the start."""
        tag = f"fingerprint.{name}"
        known = view.load(self.directory).tags.get(tag, value) if self.continued else value
        if known != value:
            log.warning("%s changed since the run began (%s, now %s)", name, known[:12], value[:12])
        self.tag(**{tag: value})

    def artifact(self, path: Path | str, name: str | None = None, kind: str = "file") -> Path:
        """Record a file or folder that the run made, with checksums; one from outside is copied in.

        Returns where it stands in the run. Raises FileNotFoundError.
        """
        source = Path(path).absolute()
        if not source.is_relative_to(self.directory.path):
            target = self.directory.artifacts / source.name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)
            source = target
        files = artifacts.describe(self.directory, source)
        self._append("artifact", name=name or source.name, kind=kind, files=files)
        return source

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self.end(error.status)
        elif isinstance(error, KeyboardInterrupt):
            self.end(view.INTERRUPTED)
        elif error is not None:
            self.end(view.FAILED, f"{type(error).__name__}: {error}")
        else:
            self.end(view.FINISHED)
        self.close()

    # -- what the loop and the commands call ----------------------------------------------

    _stepped_by_trainer = False

    def take_over_steps(self) -> None:
        """From now on a Trainer says which step it is. Raises ValueError where one does already."""
        if self._stepped_by_trainer:
            raise ValueError("a run has one Trainer: its checkpoints are that one's")
        self._stepped_by_trainer = True

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append an event of the loop: plan, resumed, checkpoint."""
        self._append(kind, **fields)

    def flush(self) -> None:
        """Write every metric logged so far, waiting for the device, and sync the journal to disk."""
        self._write_arrived(wait=True)
        self._journal.sync()

    def end(self, status: str, error: str | None = None) -> None:
        """End the attempt with a status. Artifacts may still be recorded until `close`."""
        if not self._ended:
            self._ended = True
            self._append("attempt_ended", status=status, error=error)
            self._journal.sync()

    def close(self) -> None:
        """Let go of the run. The follower goes on by itself until everything is shipped."""
        self._journal.close()
        log.removeHandler(self._logging)
        self._logging.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard_if_unused(self) -> None:
        """Undo the opening: delete a run that this attempt made and never logged to."""
        self.close()
        if not self.continued and not self._used:
            self.directory.remove()

    def wait_for_sinks(self, timeout: float) -> list[Any]:
        """After `close`: wait for the follower up to `timeout` seconds; returns each sink's state."""
        if self._follower is None:
            return []
        return list(follower.wait(self.directory, self._follower, timeout))

    def _append(self, kind: str, /, **fields: Any) -> None:
        self._write_arrived(wait=True)
        with self._lock:
            self._journal.append(kind, **fields)

    def _write_arrived(self, wait: bool) -> None:
        """Write the pending points in order, up to the first that is still on its way."""
        with self._lock:
            while self._pending and (wait or self._pending[0][2].arrived):
                step, at, deferred = self._pending.popleft()
                values = deferred.read()
                self.latest.update(values)
                self._journal.append("metrics", time=at, step=step, values=journal.encode_values(values))


def _take(run: directory.RunDirectory) -> int:
    """Lock a run for this process; before all else, so that of two that start it at once one is refused."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = storage.try_lock(run.lock_file)
    except OSError as error:
        raise directory.unwritable(run, error) from error
    if lock is None:
        raise BadInput(f"another process is training {run.path} now")
    storage.release_in_children(lock)
    return lock


def _config_record(config: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(config):
        return configs.record(config)
    return dict(config or {})


def _explain_drift(run: directory.RunDirectory, changes: Mapping[str, tuple[Any, Any]]) -> str:
    said = ", ".join(f"{key} was {old} and is {new} now" for key, (old, new) in changes.items())
    overrides = " ".join(f"{key}={new}" for key, (_, new) in changes.items())
    return (
        f"run {run.id!r} exists with another config: {said}. "
        f"Continue it with the change by `stoker resume {run.id} {overrides}`, or choose another --name"
    )


def _log_to(file: Path) -> logging.Handler:
    """Write the library's messages to the rank's log as well."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    return handler
