"""What a search is after, by what measure its trials end early, and how much of it there is."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stoker.duration import COUNTED, Duration, clock
from stoker.errors import BadInput

Goal = Literal["min", "max"]

SHARE = "percent"
"""The unit of a share of the data: each length is a training of its own, on so much of it."""
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*(gpuh|h)")


@dataclass(frozen=True)
class Objective:
    """A metric that is to become best, and which way."""

    metric: str
    goal: Goal

    def lower(self, value: float) -> float:
        """A value so that smaller is better."""
        return value if self.goal == "min" else -value


@dataclass(frozen=True)
class Budget:
    """How much a search may spend over all of its trials, in hours of a rank or in a unit of training."""

    amount: float
    unit: str
    """hour, or as a Duration's."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `40gpuh` (a rank has a GPU), `40h`, `300ep`, `1_000_000tok`, `20000`. Raises BadInput."""
        if match := _BUDGET.fullmatch(text.strip().lower()):
            hours = float(match[1])
            if not 0 < hours < math.inf:
                raise BadInput(f"--budget {text}: give a number of hours above 0")
            return cls(hours, "hour")
        try:
            found = Duration.parse(text)
        except ValueError:
            found = None
        if found is None or found.unit not in COUNTED:
            raise BadInput(
                f"--budget {text}: give hours of all ranks, as 40gpuh, or training, as 300ep, "
                "20000 (steps) or 1_000_000tok"
            )
        return cls(found.count, found.unit)


@dataclass(frozen=True)
class Plan:
    """What a search does, beside its space, sampler and scheduler."""

    folder: Path
    """Of the sweep: its trials' runs stand in it."""
    recipe: str
    """The recipe's reference."""
    config: type
    objectives: tuple[Objective, ...]
    """By the first one trials end early."""
    trials: int
    provenance: Path
    """What trials that are begun now are made from."""
    seed: int = 0
    ranks: int = 1
    """Processes of a trial."""
    unit: str = "step"
    """What schedulers count by: as a Duration's, or `SHARE`."""
    whole: float | None = None
    """How much of it a trial is that nothing ends early, where that is known."""
    max_failures: int | None = None
    budget: Budget | None = None
    deadline: float | None = None
    """When no more is begun, and what runs stops with a checkpoint; by the machine's monotonic clock."""

    @property
    def first(self) -> Objective:
        """The one by which trials end early."""
        return self.objectives[0]

    @property
    def limited(self) -> bool:
        """Whether the search may be over before all of its trials are begun."""
        return self.budget is not None or self.deadline is not None


def span(least: str | None, most: str | None) -> tuple[float | None, float | None, str]:
    """The first rung and the length of a whole trial, as `1ep` and `9ep`; and their unit. Raises BadInput."""
    found = {name: _counted(name, text) for name, text in (("--least", least), ("--most", most)) if text}
    units = {duration.unit for duration in found.values()}
    if len(units) > 1:
        raise BadInput(f"--least {least} and --most {most} are counted by two units: give both in one")
    counts = [found[name].count if name in found else None for name in ("--least", "--most")]
    return counts[0], counts[1], units.pop() if units else "step"


def unit_of(unit: str, budget: Budget | None, *, counts: bool) -> str:
    """What a search counts by: its rungs and its budget by the same. Raises BadInput.

    Args:
        unit: of --least and --most.
        counts: whether they are given.
    """
    if budget is None or budget.unit in ("hour", unit):
        return unit
    if counts:
        raise BadInput(
            f"--budget is counted by {budget.unit}s, --least and --most by {unit}s: give all in one unit"
        )
    return budget.unit


def deadline(max_time: str | None, *others: float) -> float | None:
    """When a search is to stop, by the machine's monotonic clock: after `3h55m`, or other limits in seconds.

    Raises BadInput.
    """
    try:
        limits = [*([clock(max_time)] if max_time is not None else []), *others]
    except ValueError as error:
        raise BadInput(f"--max-time: {error}") from error
    return time.monotonic() + min(limits) if limits else None


def _counted(name: str, text: str) -> Duration:
    if share := _SHARE.fullmatch(text.strip()):
        if not 0 < float(share[1]) <= 100:
            raise BadInput(f"{name} {text}: a share of the data lies above 0% and is 100% at most")
        return Duration(float(share[1]), SHARE)
    try:
        found = Duration.parse(text)
    except ValueError as error:
        raise BadInput(f"{name} {error}") from error
    if found.unit not in COUNTED:
        raise BadInput(
            f"{name} {text}: trials are compared by how far they are, not by the clock: "
            "give steps, epochs (9ep), samples, tokens or a share of the data (30%)"
        )
    return found
