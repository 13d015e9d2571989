"""What a controller needs of whatever runs the processes of its trials: local workers, or a Ray cluster."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from stoker.tune.trial import Began, Ended, Report, TrialJob


class Executor(Protocol):
    """Runs the processes of trials."""

    def prepare(self) -> None:
        """Wait until the first trial can start without delay."""
        ...

    @property
    def free(self) -> bool:
        """Whether there is room for one more trial."""
        ...

    @property
    def running(self) -> list[int]:
        """The numbers of the running trials."""
        ...

    def start(self, job: TrialJob) -> None:
        """Start a trial."""
        ...

    def wait(self, timeout: float | None = None) -> list[Report | Ended | Began]:
        """What has happened; waits until something does, or for `timeout` seconds."""
        ...

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to save a checkpoint."""
        ...

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; `wait` returns their ends."""
        ...

    def kill(self) -> None:
        """Kill all trials at once."""
        ...

    def close(self) -> None:
        """Release whatever is held while no trial runs."""
        ...


@runtime_checkable
class TakesAhead(Protocol):
    """What an executor also has if it can queue trials: where they are short, their processes then never
    wait for the controller."""

    @property
    def takes_ahead(self) -> bool:
        """Whether `ahead` accepts one more trial."""
        ...

    def ahead(self, job: TrialJob) -> None:
        """Queue a trial to start as soon as there is room; `wait` then returns its `Began`."""
        ...
