"""Metrics reduced over ranks, without any rank waiting for another.

Each rank appends its own value to its own journal file, and readers of the journal reduce them. A point
exists once all ranks of the attempt have logged it.
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
    """Reduce values to one; NaN if one of them is. Raises KeyError for an unknown `how`."""
    return _REDUCE[how](values)


class Reduction:
    """The values of one attempt that are incomplete until other ranks have logged theirs."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._waiting: dict[tuple[str, int], dict[int, float]] = {}

    def add(self, how: str, step: int, values: Mapping[str, float], rank: int) -> dict[str, float]:
        """Add one rank's values; returns the metrics that are now complete, reduced over ranks.

        If a rank has several values for a metric and step, the first one stands. Raises KeyError for an
        unknown `how`.
        """
        complete = {}
        for metric, value in values.items():
            of_ranks = self._waiting.setdefault((metric, step), {})
            of_ranks.setdefault(rank, value)
            if len(of_ranks) == self._world:
                complete[metric] = reduced(how, [of_ranks[r] for r in sorted(of_ranks)])
                del self._waiting[metric, step]
        return complete
