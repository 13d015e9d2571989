"""Where a job can run, and what each target must provide.

A target is a module with these functions. To add one, write a module, and add a line to `TARGETS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

from stoker.errors import BadInput, nearest
from stoker.launch.jobs import Job

LOCAL = "local"
RAY = "ray"
KUBERNETES = "kubernetes"
TARGETS = {
    "slurm": "stoker.launch.slurm",
    RAY: "stoker.launch.ray_jobs",
    KUBERNETES: "stoker.launch.kubernetes",
}


class Status(NamedTuple):
    """The state of a job."""

    state: str
    """queued, running, suspended, ending, done, failed, cancelled, or unknown if the target forgot it."""
    reason: str = ""
    """In the target's words, if it gives a reason."""

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state not in ("queued", "running", "suspended", "ending")


class Line(NamedTuple):
    """A line of a job's output."""

    source: str
    """The writer: `rank 3`, `node 0`."""
    text: str


class Submits(Protocol):
    """What submits a job to a target."""

    def check(self, job: Job) -> None:
        """Raises BadInput for what the target cannot run, before anything is written."""

    def render(self, job: Job) -> str:
        """Exactly what would be submitted, with or without the target's client here. Raises BadInput."""

    def code(self, job: Job) -> str:
        """A description of the code that the job runs, for the submitter."""

    def submit(self, job: Job, rendered: str) -> str:
        """Submit a job; returns the id that the target assigns. Raises StokerError."""


class Answers(Protocol):
    """What a target says about its jobs."""

    def states(self, jobs: Sequence[Job]) -> dict[str, Status]:
        """The states of jobs, by `Job.id`. Raises StokerError if the target does not answer."""

    def ended(self, jobs: Sequence[Job]) -> dict[str, Status]:
        """How jobs ended, for those that record it themselves, without asking the target."""

    def cancel(self, job: Job, *, at_once: bool) -> None:
        """End a job for good: after a checkpoint, unless `at_once`. Raises StokerError."""

    def lines(self, job: Job, *, follow: bool) -> Iterator[Line]:
        """The output of a job so far; with `follow`, until it ends."""


class Target(Submits, Answers, Protocol):
    """Both."""


def of(name: str) -> Target:
    """The target with a name. Raises BadInput."""
    if name not in TARGETS:
        allowed = (LOCAL, *TARGETS)
        raise BadInput(f"--on {name}: must be one of {', '.join(allowed)}{nearest(name, allowed)}")
    return cast(Target, importlib.import_module(TARGETS[name]))
