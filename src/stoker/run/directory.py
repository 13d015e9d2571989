"""The layout of a run's directory.

runs/<experiment>/<run-id>/
  run.json            written once
  provenance/         code, packages, hardware, data
  journal/            append-only events, one file per writer
  checkpoints/        step-00000500/ ...
  artifacts/          what the run made
  sinks/              how far each sink has read the journal
  logs/
"""

from __future__ import annotations

import functools
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from stoker import disk, storage
from stoker.errors import BadInput, StokerError
from stoker.run import lease

SWEEP = "sweep.json"
"""A file in an experiment's folder, whose runs are then the trials of a search."""
SWEEP_LOCK = "sweep.lock"
"""A file next to it, locked while the search runs."""
BEST = "best.json"
"""A file next to it with the best trial so far, which only the search can tell."""
FORMAT = 1  # of run.json and of the journal
MANIFEST = "manifest.json"
"""The manifest of a checkpoint, written after all its other files."""
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(step: int) -> str:
    """The name of the directory of a step's checkpoint: `step-00000500`."""
    return f"step-{step:08d}"


def step_of(folder: str) -> int:
    """The step of a checkpoint, from the name of its directory; -1 for a folder of another kind."""
    match = _STEP_FOLDER.fullmatch(folder)
    return int(match[1]) if match else -1


def gone(path: Path) -> StokerError:
    """The error of a run that is no longer where it was when its training began."""
    return StokerError(
        f"{path} is gone: it was moved or deleted during training; "
        "`stoker resume` continues it from its new place"
    )


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Nothing is read or created until it is asked for."""

    path: Path

    @functools.cached_property
    def id(self) -> str:
        return self.path.name

    @functools.cached_property
    def experiment(self) -> str:
        return self.path.parent.name

    @functools.cached_property
    def name(self) -> str:
        """The run's name within its runs folder: `experiment/id`."""
        return f"{self.experiment}/{self.id}"

    @functools.cached_property
    def runs(self) -> Path:
        """The runs folder that it is in."""
        return self.path.parent.parent

    @functools.cached_property
    def record_file(self) -> Path:
        return self.path / "run.json"

    @functools.cached_property
    def journal(self) -> Path:
        return self.path / "journal"

    @functools.cached_property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @functools.cached_property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @functools.cached_property
    def provenance(self) -> Path:
        return self.path / "provenance"

    @functools.cached_property
    def sinks(self) -> Path:
        return self.path / "sinks"

    @functools.cached_property
    def compacted(self) -> Path:
        """A copy of the view of a finished run; see `run/compact.py`."""
        return self.path / "compacted.safetensors"

    @functools.cached_property
    def logs(self) -> Path:
        return self.path / "logs"

    @functools.cached_property
    def lock_file(self) -> Path:
        """Locked by the process that trains this run, as long as it lives."""
        return self.path / "attempt.lock"

    @property
    def trained_here(self) -> bool:
        """Whether a process on this machine is training this run now."""
        return storage.is_locked(self.lock_file)

    @property
    def alive(self) -> bool:
        """Whether a process is training this run now, here or, as far as known, on another machine."""
        return self.trained_here or bool(lease.held_elsewhere(self.path))

    @property
    def is_trial(self) -> bool:
        """Whether the run is a trial of a search."""
        return (self.path.parent / SWEEP).is_file()

    def exists(self) -> bool:
        """Whether the run exists; an empty `run.json`, left by a power cut, does not count."""
        try:
            return self.record_file.stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False

    def check_is_there(self) -> None:
        """Raise StokerError if the directory of a run that is being trained has gone."""
        if not self.path.exists():
            raise gone(self.path)

    def record(self) -> dict[str, Any]:
        """The contents of `run.json`: recipe, config and sources, seed, parents. Raises BadInput."""
        try:
            record = orjson.loads(self.record_file.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise BadInput(f"{self.record_file} cannot be read: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise BadInput(
                f"{self.record_file} is not in format {FORMAT}: it was written by another version of stoker"
            )
        return record

    def prepare(self) -> None:
        """Create the directory of a new run. Raises BadInput if it cannot be created."""
        try:
            self.make_folders()
        except OSError as error:
            self.remove()
            raise unwritable(self, error) from error

    def create(self, record: dict[str, Any]) -> None:
        """Write `run.json`, which makes the run exist. Raises BadInput if it cannot be written.

        For about a second, a power cut can still lose the whole run.
        """
        if not self.logs.is_dir():  # made last
            self.prepare()
        try:
            storage.write_atomically(
                self.record_file,
                orjson.dumps({"format": FORMAT, **record}, option=orjson.OPT_INDENT_2),
                lasts=False, synced=False,
            )  # fmt: skip
            disk.bring_soon(self.record_file, *(self.path, *self.path.parents)[:3])  # up to the runs folder
        except OSError as error:
            self.remove()
            raise unwritable(self, error) from error

    def make_folders(self) -> None:
        """Create the directory and its folders, except those that may never be needed. Raises OSError."""
        for folder in (self.journal, self.artifacts, self.provenance, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Delete the run, and its experiment's folder if that is then empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in (self.path.parent, self.runs):
            try:
                parent.rmdir()
            except OSError:
                break


def unwritable(run: RunDirectory, error: OSError) -> BadInput:
    """The error for a run whose directory cannot be created."""
    return BadInput(
        f"the run cannot be written to {run.path}: {error.strerror}; "
        "choose another folder with --runs or STOKER_RUNS"
    )


def new_id() -> str:
    """A run id that sorts by time: `20261123-051200-3f9a`."""
    return time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
