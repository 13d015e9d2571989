"""Metrics reduced over ranks, without one rank ever waiting for another.

Every rank appends its own value to its own journal file; whoever reads the journal puts them
together. A point is there once all ranks of the attempt have logged it, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

How: TypeAlias = Literal["mean", "sum", "max", "min"]

_REDUCE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: (
        math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values)
    ),
    "sum": lambda values: math.fsum(values) if all(map(math.isfinite, values)) else sum(values),
    "max": lambda values: math.nan if any(map(math.isnan, values)) else max(values),
    "min": lambda values: math.nan if any(map(math.isnan, values)) else min(values),
}
WAYS = get_args(How)


def reduced(how: str, values: Sequence[float]) -> float:
    """Values as one; NaN where one of them is. Raises KeyError for an unknown way."""
    return _REDUCE[how](values)


class Reduction:
    """The values of one attempt that wait for other ranks."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._waiting: dict[tuple[str, int], dict[int, float]] = {}

    def add(self, how: str, step: int, values: Mapping[str, float], rank: int) -> dict[str, float]:
        """Take one rank's values; returns those that are complete now. Raises KeyError for an unknown way.

        A rank's first value of a metric and step stands.
        """
        complete = {}
        for metric, value in values.items():
            of_ranks = self._waiting.setdefault((metric, step), {})
            of_ranks.setdefault(rank, value)
            if len(of_ranks) == self._world:
                complete[metric] = reduced(how, [of_ranks[r] for r in sorted(of_ranks)])
                del self._waiting[metric, step]
        return complete
