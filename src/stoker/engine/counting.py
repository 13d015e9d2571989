"""Converts durations into steps of a loader."""

from __future__ import annotations

import math
from typing import Protocol

from stoker.duration import Duration


class Counted(Protocol):
    """What durations are counted with."""

    batch_size: int
    samples_per_epoch: int
    tokens_per_sample: float | None


def steps_in(
    duration: Duration, loader: Counted, steps: int = 0, samples: int = 0, tokens: float = 0.0
) -> int:
    """The number of steps in a duration, rounded up, given the steps, samples and tokens already done.

    The batches of the steps already done, and their rows, may have had a different size. If more than the
    duration is done, it is less than the steps done.

    Raises ValueError for a time, or for tokens if the dataset does not count them.
    """
    if duration.unit == "step":
        return int(duration.count)
    per_sample = {"sample": 1.0, "epoch": 1 / loader.samples_per_epoch, "token": loader.tokens_per_sample}
    unit = per_sample.get(duration.unit)
    done = tokens if duration.unit == "token" else samples * (unit or 0.0)
    if unit is None:
        raise ValueError(f"{duration} cannot be counted here: {_why_not(duration)}")
    # Rounded down slightly first: 3 epochs of 10 samples are 30, not 30.000000000000004.
    left = math.ceil((duration.count - done) / unit / loader.batch_size - 1e-9)
    return max(1, steps + left)


def completes(every: Duration, loader: Counted, steps: int, samples: int) -> bool:
    """Whether the step that starts at this position completes another such duration."""
    before = _amount(every, loader, steps, samples)
    after = _amount(every, loader, steps + 1, samples + loader.batch_size)
    return _whole(after / every.count) > _whole(before / every.count)


def _amount(every: Duration, loader: Counted, steps: int, samples: int) -> float:
    if every.unit == "step":
        return steps
    if every.unit == "sample":
        return samples
    if every.unit == "epoch":
        return samples / loader.samples_per_epoch
    if loader.tokens_per_sample is None:
        raise ValueError(_why_not(every))
    return samples * loader.tokens_per_sample


def _whole(ratio: float) -> int:
    """Round down after adding a little: 0.3 epochs are three times 0.1, but not in floating point."""
    return math.floor(ratio + 1e-9)


def _why_not(duration: Duration) -> str:
    if duration.unit == "token":
        return "the dataset does not report how many tokens a sample has; use steps or epochs"
    return "it is a time, which differs between machines; use steps or epochs"
