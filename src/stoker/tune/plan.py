"""What a search optimises, by which unit its trials are compared, and how much it may train."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stoker import duration
from stoker.duration import COUNTED, Duration
from stoker.errors import BadInput

Goal = Literal["min", "max"]

SHARE = "percent"
"""The unit of a share of the data: each length is a separate training, on that share."""
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*(gpuh|h)")


@dataclass(frozen=True)
class Objective:
    """A metric to optimise, and in which direction."""

    metric: str
    goal: Goal

    def lower(self, value: float) -> float:
        """A value, negated if needed so that smaller is better."""
        return value if self.goal == "min" else -value


@dataclass(frozen=True)
class Budget:
    """How much a search may spend over all of its trials, in rank-hours or in a unit of training."""

    amount: float
    unit: str
    """`hour`, or a unit of a Duration."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `40gpuh` (a rank has a GPU), `40h`, `300ep`, `1_000_000tok`, `20000`. Raises BadInput."""
        if match := _BUDGET.fullmatch(text.strip().lower()):
            hours = float(match[1])
            if not 0 < hours < math.inf:
                raise BadInput(f"--budget {text}: must be a finite number of hours above 0")
            return cls(hours, "hour")
        try:
            found = Duration.parse(text)
        except ValueError:
            found = None
        if found is None or found.unit not in COUNTED:
            raise BadInput(
                f"--budget {text}: give hours over all ranks, such as 40gpuh, or an amount of training, such "
                "as 300ep, 20000 (steps) or 1_000_000tok"
            )
        return cls(found.count, found.unit)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a search, apart from its space, sampler and scheduler."""

    folder: Path
    """The folder of the sweep, which contains the runs of its trials."""
    recipe: str
    """The recipe's reference."""
    config: type
    objectives: tuple[Objective, ...]
    """The objectives; early stopping uses the first one."""
    trials: int
    provenance: Path
    """The provenance of trials that start now."""
    seed: int = 0
    ranks: int = 1
    """Processes of a trial."""
    unit: str = "step"
    """The unit that schedulers count in: a unit of a Duration, or `SHARE`."""
    whole: float | None = None
    """The length of a whole trial in this unit, if known."""
    max_failures: int | None = None
    budget: Budget | None = None
    deadline: float | None = None
    """When no more trials start and running ones stop with a checkpoint, on the machine's monotonic clock."""

    @property
    def first(self) -> Objective:
        """The objective that early stopping uses."""
        return self.objectives[0]

    @property
    def limited(self) -> bool:
        """Whether the search can end before all of its trials have started."""
        return self.budget is not None or self.deadline is not None


def span(least: str | None, most: str | None) -> tuple[float | None, float | None, str]:
    """The first rung and the length of a whole trial (`1ep` and `9ep`), and their unit. Raises BadInput."""
    found = {name: _counted(name, text) for name, text in (("--least", least), ("--most", most)) if text}
    units = {one.unit for one in found.values()}
    if len(units) > 1:
        raise BadInput(f"--least {least} and --most {most} have different units: give both in the same unit")
    counts = [found[name].count if name in found else None for name in ("--least", "--most")]
    return counts[0], counts[1], units.pop() if units else "step"


def unit_of(unit: str, budget: Budget | None, *, counts: bool) -> str:
    """The unit that a search counts in, which its rungs and its budget must share. Raises BadInput.

    Args:
        unit: the unit of --least and --most.
        counts: whether these are given.
    """
    if budget is None or budget.unit in ("hour", unit):
        return unit
    if counts:
        raise BadInput(
            f"--budget is in {budget.unit}s, --least and --most in {unit}s: give all in the same unit"
        )
    return budget.unit


def deadline(max_time: str | None, *others: float) -> float | None:
    """When a search must stop, on the machine's monotonic clock: after `3h55m`, or other limits in seconds.

    Raises BadInput.
    """
    limits = [*([duration.limit("--max-time", max_time)] if max_time is not None else []), *others]
    return time.monotonic() + min(limits) if limits else None


def _counted(name: str, text: str) -> Duration:
    if share := _SHARE.fullmatch(text.strip()):
        if not 0 < float(share[1]) <= 100:
            raise BadInput(f"{name} {text}: a share of the data must be above 0% and at most 100%")
        return Duration(float(share[1]), SHARE)
    try:
        found = Duration.parse(text)
    except ValueError as error:
        raise BadInput(f"{name} {error}") from error
    if found.unit not in COUNTED:
        raise BadInput(
            f"{name} {text}: trials are compared by progress, not by time: "
            "give steps, epochs (9ep), samples, tokens or a share of the data (30%)"
        )
    return found
