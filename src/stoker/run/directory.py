"""The layout of a run's directory, and how runs are found under a runs folder.

runs/<experiment>/<run-id>/
  run.json            written once
  provenance/         code, packages, hardware, data
  journal/            append-only events, one file a writer
  checkpoints/        step-00000500/ ...
  artifacts/          what the run made
  sinks/              how far each follower has shipped
  logs/
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.errors import BadInput, nearest

FORMAT = 1  # of run.json and of the journal
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Nothing here is read or made until it is asked for."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def experiment(self) -> str:
        return self.path.parent.name

    @property
    def record_file(self) -> Path:
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance"

    @property
    def sinks(self) -> Path:
        return self.path / "sinks"

    @property
    def compacted(self) -> Path:
        """A copy of the view of a run that has ended; see `run/compact.py`."""
        return self.path / "compacted.safetensors"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains this run, for as long as it lives."""
        return self.path / "attempt.lock"

    @property
    def alive(self) -> bool:
        """Whether a process is training this run now."""
        return storage.is_locked(self.lock_file)

    def exists(self) -> bool:
        return self.record_file.is_file()

    def record(self) -> dict[str, Any]:
        """What `run.json` says: recipe, config and sources, seed, parents. Raises BadInput."""
        try:
            record = orjson.loads(self.record_file.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise BadInput(f"{self.record_file} cannot be read: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise BadInput(
                f"{self.record_file} is not of format {FORMAT}: another version of stoker wrote it"
            )
        return record

    def create(self, record: dict[str, Any]) -> None:
        """Make the directory and write `run.json`. Raises BadInput where it cannot be written."""
        try:
            for folder in (
                self.journal,
                self.checkpoints,
                self.artifacts,
                self.provenance,
                self.sinks,
                self.logs,
            ):
                folder.mkdir(parents=True, exist_ok=True)
            storage.write_atomically(
                self.record_file, orjson.dumps({"format": FORMAT, **record}, option=orjson.OPT_INDENT_2)
            )
        except OSError as error:
            self.remove()
            raise unwritable(self, error) from error

    def remove(self) -> None:
        """Delete the run, and its experiment's folder when that is empty then."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in (self.path.parent, self.path.parent.parent):
            try:
                parent.rmdir()
            except OSError:
                break


def unwritable(run: RunDirectory, error: OSError) -> BadInput:
    """The error for a run whose directory cannot be made."""
    return BadInput(
        f"the run cannot be written to {run.path}: {error.strerror}; "
        "choose another folder with --runs or STOKER_RUNS"
    )


def new_id() -> str:
    """A run id that sorts by time: `20261123-051200-3f9a`."""
    return time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]


def locate(runs: Path, experiment: str, run_id: str) -> RunDirectory:
    """The directory of a run by experiment and id, there or not. Raises BadInput on a bad name."""
    if any(part.endswith(":") for part in runs.parts):  # s3://..., as a path
        raise BadInput(f"--runs {runs}: object stores are not supported yet; give a local path")
    for what, name in (("experiment", experiment), ("name", run_id)):
        if not _NAME.fullmatch(name):
            raise BadInput(f"{what} {name!r} cannot name a folder: use letters, digits, '.', '_' and '-'")
    return RunDirectory(runs / experiment / run_id)


def every(runs: Path) -> list[RunDirectory]:
    """All runs under a runs folder, oldest first."""
    found = [RunDirectory(file.parent) for file in runs.glob("*/*/run.json")]
    return sorted(found, key=lambda run: (run.record_file.stat().st_mtime_ns, run.id))


def find(runs: Path, reference: str) -> RunDirectory:
    """The run meant by a path, `experiment/id`, an id, or the start of one. Raises BadInput."""
    for path in (Path(reference), runs / reference):
        if (path / "run.json").is_file():
            return RunDirectory(path.absolute())
    everything = every(runs)
    same = [run for run in everything if run.id == reference]
    matches = same or [run for run in everything if run.id.startswith(reference)]
    if len(matches) == 1:
        return RunDirectory(matches[0].path.absolute())
    if matches:
        names = ", ".join(f"{run.experiment}/{run.id}" for run in matches[:8])
        raise BadInput(f"{reference!r} means several runs: {names}; give more of the name")
    hint = nearest(reference, [run.id for run in everything])
    raise BadInput(f"no run {reference!r} under {runs}{hint}; `stoker runs list` shows what there is")
