"""The interface of a sink: four methods, so that adding a tracker means adding one class.

A sink receives batches made from the journal. It must be idempotent: if a follower dies before it has
recorded that a batch was shipped, the same data are shipped again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

LARGEST_ARTIFACT = 512 * 2**20  # bytes; a larger one is not copied: the sink only says where it is


@dataclass(frozen=True)
class Point:
    """A metric's value at a step; `time` in seconds since 1970 is when it was logged."""

    metric: str
    step: int
    value: float
    time: float


@dataclass
class Batch:
    """The part of a journal that is shipped to a sink at once."""

    points: list[Point] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    """`media` events: kind, name, step, file, about."""
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`artifact` events by name, the newest of each. Also has the list of files of every artifact of this
    name that it replaces and that the sink may have, as `replaced`."""
    tags: dict[str, str | None] = field(default_factory=dict)
    """None removes a tag."""
    params: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """All notes of the run, the newest last, if there is a new one; otherwise empty."""
    used: list[dict[str, Any]] = field(default_factory=list)
    """`used` events: name, the run that made it (or None), files."""
    attempt_started: bool = False

    @property
    def empty(self) -> bool:
        return not any(vars(self).values())


@dataclass(frozen=True)
class Ending:
    """How a run ended: `status` as in `run.view`, the `time`, and the error, if it failed with one."""

    status: str
    time: float
    error: str | None = None


@dataclass(frozen=True)
class SinkRun:
    """A run in a sink: its id there, and where to find it."""

    id: str
    where: str
    anew: bool = False
    """Whether the sink wants the whole journal again, because it knows what it already has."""


def key(media: Mapping[str, Any]) -> str:
    """A name for a media event that differs from those of metrics and of other kinds of media."""
    return f"{media['kind']}s/{media['name']}"


def is_too_large(files: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an artifact of these files is too large to be copied into a sink."""
    return sum(int(file["size"]) for file in files) > LARGEST_ARTIFACT


class Sink(Protocol):
    """A tracker that a journal is shipped to. Every method raises whatever its client raises.

    A sink that would store repeated data twice prevents this with a mark: the return value of
    `ship` is stored with the progress, and passed to `open`.
    """

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Find the run by its former id (`known`) or by its identity, or create it; ship its record.

        If its `edition` differs, the existing run is kept and marked as replaced, and another is created.

        `mark` is the return value of the last recorded `ship`: whatever reached the sink after it
        will be shipped again.
        """

    def ship(self, batch: Batch) -> Any:
        """Store a batch durably; returns a mark, a JSON value."""

    def conclude(self, ending: Ending) -> None:
        """Say how the run ended."""

    def close(self) -> None:
        """Release resources without waiting for a server."""
