"""Whether a metric still improves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stoker.run.series import Goal


def stale(values: Sequence[float], goal: Goal, patience: int, min_delta: float = 0.0) -> bool:
    """Whether none of the last `patience` values is better than every value before them.

    Args:
        min_delta: the smallest difference that counts as better.
    """
    costs = [value if goal == "min" else -value for value in values]
    before = [cost for cost in costs[:-patience] if not math.isnan(cost)]
    best = min(before, default=math.inf)
    return len(costs) > patience and not any(cost < best - min_delta for cost in costs[-patience:])
