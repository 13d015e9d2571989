"""The seam between the follower and where it ships to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stoker.run.journal import Event


@dataclass(frozen=True)
class Point:
    """One value of a metric at a step, logged at `time` (seconds since 1970)."""

    metric: str
    value: float
    time: float
    step: int


class Sink(Protocol):
    """Where a run is shipped. Every method may raise anything, and is called again with the same then."""

    def open(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Find or make the sink's run; `known` is what an earlier call returned, to be kept on disk."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Store points; those that were stored already must not be stored twice."""
        ...

    def record(self, event: Event) -> None:
        """Store an event that is no metric: tags, an artifact, a table."""
        ...

    def set_status(self, status: str) -> None:
        """Say what the run is now: a status of `run.view`."""
        ...
