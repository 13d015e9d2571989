"""Jobs that were submitted, as the runs folder remembers them.

runs/.jobs/<id>/
  job.json        what was submitted, where to, when and from where
  script.sh ...   what the target was handed
  node-0.log ...  what it wrote, where the target keeps that in files
  logs/           of runs in an object store: these without secrets, as they are brought there
"""

from __future__ import annotations

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
LOGS = "logs"
WRITTEN = (".txt", ".log")
"""What the files end in that the job itself writes: how its attempts went, and its logs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job: one that is about to be submitted, or one that was."""

    id: str
    target: str
    spec: JobSpec
    runs: Path
    """The runs folder."""
    trains: tuple[str, ...]
    """The runs that it trains, as experiment/name; of a sweep the folders of its trials."""
    native: str = ""
    """The id that the target has given it."""
    submitted: float = 0.0
    """When, in seconds since 1970."""
    by: str = ""
    """Who submitted it, and on which machine: me@login1."""
    code: Mapping[str, Any] = field(default_factory=dict)
    """The state of its code then, see `provenance.summary`; a job runs what is there when it starts."""
    cancelled: bool = False
    """Whether it was cancelled by `stoker jobs cancel`."""

    @property
    def folder(self) -> Path:
        return self.runs / FOLDER / self.id


def planned(target: str, spec: JobSpec, runs: Path, trains: tuple[str, ...]) -> Job:
    """A job that nothing is written of yet."""
    return Job(id=directory.new_id(), target=target, spec=spec, runs=runs.absolute(), trains=trains)


def begin(job: Job, file: str, rendered: str) -> Path:
    """Make a job's folder, with what the target is handed; returns that file. Raises BadInput."""
    try:
        job.folder.mkdir(parents=True)
        (job.folder / file).write_text(rendered, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the job cannot be written to {job.folder}: {error.strerror}") from error
    return job.folder / file


def forget(job: Job) -> None:
    """Remove what stands of a job that was not submitted after all."""
    shutil.rmtree(job.folder, ignore_errors=True)


def signed(job: Job) -> Job:
    """A job with who submits it, and the state of its code: nothing that may fail is left for afterwards."""
    code = provenance.state(job.spec.folder, job.runs)
    return replace(job, by=f"{_user()}@{platform.node()}", code=code)


def remember(job: Job, native: str) -> Job:
    """Write down a job that was submitted, with the id that the target has given it."""
    known = replace(job, native=native, submitted=time.time())
    write(known)
    return known


def write(job: Job) -> None:
    """Write a job's record; where the runs are in an object store, there too, with what was submitted."""
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


def every(runs: Path) -> list[Job]:
    """All jobs of a runs folder, oldest first; of an object store those of other machines too.

    Raises Unreachable.
    """
    _bring(runs)
    found = [_read(file, runs) for file in (runs / FOLDER).glob(f"*/{RECORD}")]
    return sorted((job for job in found if job is not None), key=lambda job: (job.submitted, job.id))


def _bring(runs: Path) -> None:
    """Bring here what other machines have written of jobs into an object store.

    Raises Unreachable where nothing is known without it.
    """
    store = object_store.of(runs.absolute())
    if store is None:
        return
    try:
        for key, stored in store.objects(FOLDER).items():
            file = runs / key
            if key.count("/") > 2:  # of its logs, which are read in the store
                continue
            if not file.is_file() or (file.name == RECORD and _older(file, stored)):
                store.get(key, file)
    except Unreachable as error:
        if not any((runs / FOLDER).glob(f"*/{RECORD}")):
            raise
        log.warning("jobs submitted from other machines are not shown: %s", error)


def _older(record: Path, stored: Stored) -> bool:
    """Whether a job was cancelled elsewhere since: nothing else changes a record, nor is that taken back."""
    return record.stat().st_size != stored.size and not storage.read_json(record).get("cancelled")


def find(runs: Path, reference: str) -> Job:
    """The job meant by its id, the start of one, the target's id, or a run's name. Raises BadInput.

    Of several jobs that trained one run the newest is meant.
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
    """Who this process runs as: by name, or by number where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return str(os.getuid())


def _name(run: str) -> str:
    return run.rpartition("/")[2]


def _read(file: Path, runs: Path) -> Job | None:
    """A job by its record, wherever the runs folder stands now; None where there is none that can be read."""
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
