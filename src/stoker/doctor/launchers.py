"""The targets that jobs can be submitted to from here, and what started this process."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from stoker import threads
from stoker.doctor.findings import Finding, note, ok, said
from stoker.errors import StokerError
from stoker.launch import jobs, targets
from stoker.launch.jobspec import JobSpec
from stoker.world import World, slurm_job

_ANSWER = 15.0  # seconds
_BRIEF = re.compile(r"; | \(")  # ends the first part of an error: the rest is for those who submit a job
_CLIENTS: Mapping[str, Callable[[], object]] = {
    "slurm": functools.partial(shutil.which, "sbatch"),
    targets.RAY: functools.partial(importlib.util.find_spec, "ray"),
    "kubernetes": functools.partial(shutil.which, "kubectl"),
}
"""What finds a target's client."""


def check() -> Iterator[Finding]:
    """Ask each target whose client is installed whether it would accept a small job; submit nothing."""
    job, world = slurm_job(), World.current()
    if job:
        yield ok(f"this process runs in {job}")
    if world.size > 1:
        yield ok(f"this process is rank {world.rank} of {world.size}, started by torchrun or the like")
    absent = [name for name in targets.TARGETS if not _CLIENTS[name]()]
    for name in targets.TARGETS:
        if name not in absent:
            with _silent():  # what C++ libraries print about a cluster is reported here
                found = _asked(name)
            yield found
    if absent:
        yield ok(f"no client for {', '.join(absent)}, needed only for --on {'|'.join(absent)}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what is written to this process's standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _asked(name: str) -> Finding:
    spec = JobSpec(name="doctor", command=("true",), folder=Path.cwd())
    job = jobs.planned(name, spec, Path("runs"), ())
    asking = threads.begun(lambda: targets.of(name).check(job), f"doctor-{name}")
    try:
        asking.result(_ANSWER)
    except TimeoutError:
        return note(f"--on {name}: no answer within {_ANSWER:.0f} s")
    except StokerError as error:
        return note(f"--on {name}: {_BRIEF.split(said(error))[0]}")
    return ok(f"--on {name}: a cluster answers, and would accept a job")
