"""Submitted jobs, as recorded in the runs folder.

runs/.jobs/<id>/
  job.json        what was submitted, where to, when and from where
  script.sh ...   what the target received
  node-0.log ...  its output, if the target keeps that in files
  logs/           for runs in an object store: the same without secrets, as uploaded
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from stoker import object_store, storage
from stoker.errors import BadInput, nearest
from stoker.launch import jobspec
from stoker.launch.jobspec import JobSpec
from stoker.object_store import Stored, Unreachable
from stoker.reproduce import provenance
from stoker.run import directory, finding

log = logging.getLogger("stoker")

FOLDER = ".jobs"  # in the runs folder
RECORD = "job.json"
_PROBE = "probe"
LOGS = "logs"
WRITTEN = (".txt", ".log")
"""Extensions of the files that the job itself writes: the record of its attempts, and its logs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that is about to be submitted, or that was submitted."""

    id: str
    target: str
    spec: JobSpec
    runs: Path
    """The runs folder."""
    trains: tuple[str, ...]
    """The runs that it trains, as experiment/name; for a sweep, the folders of its trials."""
    native: str = ""
    """The id that the target assigned."""
    submitted: float = 0.0
    """The time, in seconds since 1970."""
    by: str = ""
    """Who submitted it, and on which machine: me@login1."""
    code: Mapping[str, Any] = field(default_factory=dict)
    """The state of its code at that time, see `provenance.summary`; a job runs the code present at its
    start."""
    cancelled: bool = False
    """Whether it was cancelled with `stoker jobs cancel`."""

    @property
    def folder(self) -> Path:
        return self.runs / FOLDER / self.id


def planned(target: str, spec: JobSpec, runs: Path, trains: tuple[str, ...]) -> Job:
    """A job for which nothing is written yet."""
    return Job(id=directory.new_id(), target=target, spec=spec, runs=runs.absolute(), trains=trains)


def begin(job: Job, file: str, rendered: str) -> Path:
    """Create a job's folder, with what the target receives; returns that file. Raises BadInput."""
    try:
        job.folder.mkdir(parents=True)
        (job.folder / file).write_text(rendered, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the job cannot be written to {job.folder}: {error.strerror}") from error
    return job.folder / file


def forget(job: Job) -> None:
    """Remove the folder of a job that was not submitted after all."""
    shutil.rmtree(job.folder, ignore_errors=True)


def signed(job: Job) -> Job:
    """A job with its submitter and the state of its code, so that nothing can fail after submission."""
    code = provenance.state(job.spec.folder, job.runs)
    return replace(job, by=f"{_user()}@{platform.node()}", code=code)


def remember(job: Job, native: str) -> Job:
    """Record a job that was submitted, with the id that the target assigned."""
    known = replace(job, native=native, submitted=time.time())
    write(known)
    return known


def write(job: Job) -> None:
    """Write a job's record, and upload it with what was submitted if the runs are in an object store."""
    known = asdict(job) | {"spec": job.spec.to_json(), "runs": str(job.runs)}
    storage.write_atomically(job.folder / RECORD, orjson.dumps(known, option=orjson.OPT_INDENT_2))
    store = object_store.of(job.runs)
    if store is not None:
        try:
            for file in job.folder.iterdir():
                if file.is_file() and file.suffix not in WRITTEN:
                    store.put(f"{FOLDER}/{job.id}/{file.name}", file)
        except Unreachable as error:
            log.warning("other machines cannot see job %s yet: %s", job.id, error)


def check_store(job: Job) -> None:
    """Raises BadInput if the runs are in a bucket that does not exist: the job would fail when it starts.

    A store that cannot be reached from here may be reachable where the job runs.
    """
    store = object_store.of(job.runs)
    if store is None:
        return
    key = f"{FOLDER}/{job.id}/{LOGS}/{_PROBE}"  # where no other machine takes it for a part of the job
    try:
        store.write(key, b"")
        store.remove(key)
    except FileNotFoundError as error:
        raise BadInput(f"{store.url}: this bucket does not exist") from error
    except Unreachable as error:
        log.debug("%s", error)


def every(runs: Path) -> list[Job]:
    """All jobs of a runs folder, oldest first; for an object store, those of other machines too.

    Raises Unreachable.
    """
    _bring(runs)
    found = [_read(file, runs) for file in (runs / FOLDER).glob(f"*/{RECORD}")]
    return sorted((job for job in found if job is not None), key=lambda job: (job.submitted, job.id))


def _bring(runs: Path) -> None:
    """Download what other machines have recorded about jobs in an object store.

    Raises Unreachable if nothing is known without it.
    """
    store = object_store.of(runs.absolute())
    if store is None:
        return
    try:
        for key, stored in store.objects(FOLDER).items():
            file = runs / key
            if key.count("/") > 2:  # its logs, which are read in the store
                continue
            if not file.is_file() or (file.name == RECORD and _older(file, stored)):
                with contextlib.suppress(FileNotFoundError):  # removed since
                    store.get(key, file)
    except Unreachable as error:
        if not any((runs / FOLDER).glob(f"*/{RECORD}")):
            raise
        log.warning("jobs submitted from other machines are not shown: %s", error)


def _older(record: Path, stored: Stored) -> bool:
    """Whether a job was cancelled elsewhere since: the only change that a record can have."""
    return record.stat().st_size != stored.size and not storage.read_json(record).get("cancelled")


def find(runs: Path, reference: str) -> Job:
    """The job with this id, start of an id, target's id, or run name. Raises BadInput.

    If several jobs trained a run, the newest one.
    """
    if not reference:
        raise BadInput("give a job's id, the start of its id, the cluster's id, or a run's name")
    known = every(runs)
    exact = [job for job in known if reference in (job.id, job.native)]
    named = [job for job in known if any(reference in (run, _name(run)) for run in job.trains)]
    begun = [job for job in known if job.id.startswith(reference)]
    found = exact or named[-1:] or begun
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{reference!r} matches several jobs: {', '.join(j.id for j in found[:8])}")
    names = [name for job in known for name in (job.id, job.native, *map(_name, job.trains))]
    hint = nearest(reference, names)
    raise BadInput(
        f"no job {reference!r} under {finding.shown(runs)}{hint}; `stoker jobs list` shows all jobs"
    )


def _user() -> str:
    """The user of this process, by name, or by number if the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return str(os.getuid())


def _name(run: str) -> str:
    return run.rpartition("/")[2]


def _read(file: Path, runs: Path) -> Job | None:
    """A job from its record, wherever the runs folder is now; None if there is no readable record."""
    record = storage.read_json(file)
    if not record:
        return None
    kept = jobspec.known_to(Job, record)
    try:
        spec = JobSpec.from_json(kept["spec"])
        return Job(**{**kept, "spec": spec, "trains": tuple(kept["trains"]), "runs": runs.absolute()})
    except (KeyError, TypeError, BadInput) as error:
        log.warning("%s cannot be read and is ignored: %s", file, error)
        return None
