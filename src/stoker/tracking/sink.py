"""What a sink is to the follower: four words, so that another tracker is one more class.

A sink is told what to store in batches made from the journal. It must be idempotent: a
batch whose follower died before it could note down that it was shipped is shipped again,
the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Point:
    """A metric's value at a step; `time` in seconds since 1970 is when it was logged."""

    metric: str
    step: int
    value: float
    time: float


@dataclass
class Batch:
    """What one stretch of the journal adds to a sink's run."""

    points: list[Point] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    """`media` events: kind, name, step, file, about."""
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`artifact` events by name, the newest of each."""
    tags: dict[str, str | None] = field(default_factory=dict)
    """None takes a tag away."""
    params: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """All notes of the run, the newest last, where there is a new one; else none."""
    attempt_started: bool = False

    @property
    def empty(self) -> bool:
        return not any(vars(self).values())


@dataclass(frozen=True)
class Ending:
    """How a run ended: `status` as in `run.view`; `time` is when."""

    status: str
    time: float


@dataclass(frozen=True)
class SinkRun:
    """A run in a sink: its id there, and where a person finds it."""

    id: str
    where: str
    anew: bool = False
    """Whether the sink wants the whole journal again: it knows best what it has."""


def key(media: Mapping[str, Any]) -> str:
    """What a media event is called where metrics have names too, and one name may be of all kinds."""
    return f"{media['kind']}s/{media['name']}"


class Sink(Protocol):
    """A tracker that a journal is shipped to. Every method raises whatever its client raises.

    A sink that stores what it is given a second time twice keeps it from happening with a
    mark: what `ship` returns is kept with how far it was, and handed to `open`.
    """

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Find the run by the id it had (`known`) or by its identity, or make it; ship its record.

        Where it is of another `edition` than this, it stays, marked as replaced, and another is made.

        `mark` is what the last `ship` that was noted down returned: whatever came to the sink
        after it will be shipped again.
        """

    def ship(self, batch: Batch) -> Any:
        """Store a batch, to last; returns a mark, a JSON value."""

    def conclude(self, ending: Ending) -> None:
        """Say how the run ended."""

    def close(self) -> None:
        """Let go of what is held; never waits for a server."""
