"""Where a job may run, and what is asked of each such target.

A target is a module with these functions. Another one is another module, and a line in `TARGETS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

from stoker.errors import BadInput, nearest
from stoker.launch.jobs import Job

LOCAL = "local"
RAY = "ray"
TARGETS = {
    "slurm": "stoker.launch.slurm",
    RAY: "stoker.launch.ray_jobs",
    "kubernetes": "stoker.launch.kubernetes",
}


class Status(NamedTuple):
    """How a job is."""

    state: str
    """queued, running, ending, done, failed, cancelled, or unknown where the target has forgotten it."""
    reason: str = ""
    """In the target's words, where it says one."""

    @property
    def over(self) -> bool:
        """Whether it will do nothing more."""
        return self.state not in ("queued", "running", "ending")


class Line(NamedTuple):
    """A line that a job has written."""

    source: str
    """Who wrote it: `rank 3`, `node 0`."""
    text: str


class Submits(Protocol):
    """What brings a job to a target."""

    def check(self, job: Job) -> None:
        """Refuse what the target cannot run, before anything is written. Raises BadInput."""

    def render(self, job: Job) -> str:
        """Exactly what would be submitted, whether the target's client is here or not. Raises BadInput."""

    def code(self, job: Job) -> str:
        """Which code the job runs, in words for whom submits it."""

    def submit(self, job: Job, rendered: str) -> str:
        """Hand a job over; returns the id that the target gives it. Raises StokerError."""


class Answers(Protocol):
    """What a target says of jobs that it has."""

    def states(self, jobs: Sequence[Job]) -> dict[str, Status]:
        """How jobs are, by `Job.id`. Raises StokerError where the target does not answer."""

    def ended(self, jobs: Sequence[Job]) -> dict[str, Status]:
        """How jobs ended, of those that have written it down themselves: the target is not asked."""

    def cancel(self, job: Job, *, at_once: bool) -> None:
        """End a job for good: after a checkpoint, unless `at_once`. Raises StokerError."""

    def lines(self, job: Job, *, follow: bool) -> Iterator[Line]:
        """What a job has written so far; with `follow` until it is over."""


class Target(Submits, Answers, Protocol):
    """Both."""


def of(name: str) -> Target:
    """The target of a name. Raises BadInput."""
    if name not in TARGETS:
        allowed = (LOCAL, *TARGETS)
        raise BadInput(f"--on {name}: must be one of {', '.join(allowed)}{nearest(name, allowed)}")
    return cast(Target, importlib.import_module(TARGETS[name]))
