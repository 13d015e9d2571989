"""Learning-rate schedules: pure functions of the step, so there is no state to save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal

log = logging.getLogger("stoker")

Schedule = Callable[[int, int], float]
"""(step, total steps) -> the factor for the optimizer's learning rate; steps count from 0."""

Shape = Literal["constant", "linear", "cosine", "wsd"]


def build(shape: Shape, *, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2) -> Schedule:
    """Linear warm-up, then constant, or decay to the share `floor` of the peak.

    `warmup` below 1 is a share of the steps, from 1 on a number of steps.
    `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays constant, then decays
    linearly over the last share `decay` of the steps.
    """

    def factor(step: int, total: int) -> float:
        warmup_steps = round(warmup * total) if warmup < 1 else int(warmup)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if shape == "wsd":
            falling = max(1, round(decay * total))
            done = max(0.0, (step - (total - falling)) / falling)
        else:
            done = (step - warmup_steps) / max(1, total - warmup_steps)
        return floor + (1.0 - floor) * _decay(shape, done)

    return factor


def warn_of_no_peak(schedule: Schedule, total: int) -> None:
    """Warn if the learning rate still rises at the last step: the warm-up is longer than the training."""
    if total > 1 and schedule(total - 2, total) < (last := schedule(total - 1, total)) < 1:
        log.warning(
            "the learning rate still rises at the last of %d steps, where it is %.3g of what was asked for: "
            "shorten the warm-up, or train longer",
            total, last,
        )  # fmt: skip


def _decay(shape: Shape, done: float) -> float:
    """From 1 at done=0 to 0 at done=1."""
    if shape in ("linear", "wsd"):
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
