"""Learning-rate schedules: pure functions of the step, so there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int, int], float]
"""(step, total steps) -> what the optimizer's learning rate is multiplied by; steps count from 0."""

Shape = Literal["constant", "linear", "cosine"]


def build(shape: Shape, *, warmup: float = 0.0, floor: float = 0.0) -> Schedule:
    """Linear warm-up over the share `warmup` of the steps, then constant, or down to `floor`."""

    def factor(step: int, total: int) -> float:
        warmup_steps = round(warmup * total)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total - warmup_steps)
        return floor + (1.0 - floor) * _decay(shape, done)

    return factor


def _decay(shape: Shape, done: float) -> float:
    """From 1 at done=0 to 0 at done=1."""
    if shape == "linear":
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
