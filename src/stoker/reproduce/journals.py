"""Compares the metrics of two runs: equal to the last bit, or where they diverge and how far they drift.

Two values are equal if they have the same bits; NaN equals NaN, and 0.0 does not equal -0.0. Metrics of
time and machines are excluded, see `run.series.measures_machine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stoker.run.series import Series, measures_machine
from stoker.words import counted


@dataclass(frozen=True)
class Drift:
    """How a metric of one run differs from the same metric of another."""

    metric: str
    first_step: int
    """The first step at which it differs, or exists in only one run."""
    before: float | None
    """Its value there; None if the run has none."""
    now: float | None
    points: int
    """Steps at which both have it."""
    differing: int
    """Of these, steps at which it differs."""
    absolute: float
    """The largest difference."""
    absolute_step: int | None
    relative: float
    """The largest difference relative to the larger of the two values."""
    relative_step: int | None
    lacking: int
    """Steps at which only the first run has it."""
    added: int
    """Steps at which only the second run has it."""


@dataclass(frozen=True)
class Compared:
    """The metrics of two runs over a range of steps."""

    steps: int
    """Steps at which anything was compared, besides what was measured before the first."""
    first: int | None
    last: int | None
    metrics: tuple[str, ...]
    """The compared metrics."""
    left_out: tuple[str, ...]
    """Metrics of time and machines, and those excluded on request."""
    drifts: tuple[Drift, ...]
    """The metrics that differ, in the order in which they first differ."""
    of_one_end: tuple[str, ...] = ()
    """Metrics whose point at the last step was left out, since only one of the two runs logged it."""

    @property
    def identical(self) -> bool:
        """Whether there was something to compare, and all of it is bit-identical."""
        return bool(self.metrics) and not self.drifts

    @property
    def extent(self) -> str:
        """` over 20 steps`; empty if the run has no step, only values from before the first."""
        return f" over {counted(self.steps, 'step')}" if self.steps else ""


def compare(
    before: Mapping[str, Series],
    now: Mapping[str, Series],
    *,
    after: int | None = None,
    until: int | None = None,
    cut: int | None = None,
    leave_out: Callable[[str], bool] = measures_machine,
) -> Compared:
    """Compare the metrics of two runs.

    Args:
        before: metric -> its points, of the first run.
        now: likewise of the second run.
        after: only steps after this one count.
        until: only steps up to this one count.
        cut: the last step, if a run was stopped or killed there: it may lack the evaluation of that step, or
            what the other one measured at its end.
        leave_out: whether to exclude a metric.
    """
    names = sorted({*before, *now})
    wanted = [name for name in names if not leave_out(name)]
    of_one_end = _of_one_end(before, now, wanted, cut) if cut is not None else ()
    pairs = {
        name: (_within(before.get(name), after, until), _within(now.get(name), after, until))
        for name in wanted
    }
    for name in of_one_end:
        pairs[name] = (_but(pairs[name][0], cut), _but(pairs[name][1], cut))
    pairs = {name: pair for name, pair in pairs.items() if len(pair[0]) or len(pair[1])}
    drifts = [drift for name, pair in pairs.items() if (drift := _drift(name, *pair)) is not None]
    seen = [np.concatenate([a.x, b.x]) for a, b in pairs.values()]
    steps = np.unique(np.concatenate(seen)) if seen else np.empty(0, np.int64)
    return Compared(
        steps=int(np.count_nonzero(steps)),
        first=int(steps[0]) if len(steps) else None,
        last=int(steps[-1]) if len(steps) else None,
        metrics=tuple(pairs),
        left_out=tuple(name for name in names if leave_out(name)),
        drifts=tuple(
            sorted(drifts, key=lambda drift: (drift.first_step, drift.metric != "loss", drift.metric))
        ),
        of_one_end=of_one_end,
    )


def _of_one_end(
    before: Mapping[str, Series], now: Mapping[str, Series], names: Sequence[str], step: int
) -> tuple[str, ...]:
    """The metrics that only one of the runs has at a step, if both have made it."""
    here, there = ({name for name in names if step in of.get(name, ())} for of in (before, now))
    return tuple(sorted(here ^ there)) if here and there else ()


def _within(series: Series | None, after: int | None, until: int | None) -> Series:
    if series is None:
        return Series(np.empty(0, np.int64), np.empty(0), np.empty(0))
    kept = np.ones(len(series), bool)
    if after is not None:
        kept &= series.x > after
    if until is not None:
        kept &= series.x <= until
    return Series(series.x[kept], series.y[kept], series.time[kept])


def _but(series: Series, step: int | None) -> Series:
    kept = series.x != step
    return Series(series.x[kept], series.y[kept], series.time[kept])


def _drift(metric: str, before: Series, now: Series) -> Drift | None:
    """How they differ; None if they do not."""
    both, there, here = np.intersect1d(before.x, now.x, assume_unique=True, return_indices=True)
    a, b = before.y[there], now.y[here]
    differ = ~_same_bits(a, b)
    alone = np.setxor1d(before.x, now.x, assume_unique=True)
    if not differ.any() and not len(alone):
        return None
    first = int(np.concatenate([both[differ], alone]).min())
    absolute, relative = _distances(a[differ], b[differ])
    at = both[differ]
    return Drift(
        metric, first, dict(before.items()).get(first), dict(now.items()).get(first),
        len(both), int(differ.sum()),
        *_largest(absolute, at), *_largest(relative, at),
        lacking=len(before) - len(both), added=len(now) - len(both),
    )  # fmt: skip


def _same_bits(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (a.view(np.int64) == b.view(np.int64)) | (np.isnan(a) & np.isnan(b))
    return same


def _distances(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Absolute and relative differences of values; infinite if one of the two is not finite."""
    with np.errstate(all="ignore"):
        absolute = np.abs(a - b)
        larger = np.maximum(np.abs(a), np.abs(b))
        relative = np.divide(absolute, larger, out=np.zeros_like(absolute), where=larger > 0)
    finite = np.isfinite(a) & np.isfinite(b)
    return np.where(finite, absolute, math.inf), np.where(finite, relative, math.inf)


def _largest(distances: NDArray[np.float64], steps: NDArray[np.int64]) -> tuple[float, int | None]:
    if not len(distances):
        return 0.0, None
    index = int(distances.argmax())
    return float(distances[index]), int(steps[index])


def as_json(compared: Compared) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "identical": compared.identical, "steps": compared.steps, "first": compared.first,
        "last": compared.last,
        "metrics": list(compared.metrics), "left_out": list(compared.left_out),
        "of_one_end": list(compared.of_one_end),
        "drifts": [vars(drift) for drift in compared.drifts],
    }  # fmt: skip
