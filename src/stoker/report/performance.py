"""How a run used its machines: memory, throughput, where its time went, how soon a loss was reached.

Everything is computed from the view of the run. A run without a Trainer has no such data.

The time is split by what a Trainer records at every checkpoint and evaluation (`spent`). If a later
attempt did not resume from the end of an attempt, the steps after the checkpoint were trained
again, so the seconds of that part are lost, whatever they were spent on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stoker.report import facts
from stoker.report.plots import Clock, Figure
from stoker.run.series import OF_THE_LOOP, Series
from stoker.run.state import AttemptView, RunView

TRAINING, WAITING, EVALUATING, CHECKPOINTS = "training", "waiting for data", "evaluating", "checkpoints"
STARTING, FINISHING, AGAIN, BETWEEN = "starting", "after the loop", "lost and done again", "between attempts"
KINDS = (TRAINING, WAITING, EVALUATING, CHECKPOINTS, STARTING, FINISHING, AGAIN, BETWEEN)
"""How the time of a run is spent, from its first moment to its last."""

MEMORY = "memory"
"""The name under which the table of `Trainer.memory` is logged."""

_SMOOTHED = 20  # points of the training loss, because a single one says little
_ON_THE_WAY = (0.5, 0.25, 0.1, 0.05, 0.02)  # remaining shares of the total decrease
_MOST_STAIRS = 500


@dataclass(frozen=True)
class RankMemory:
    """The memory that one rank held, in GiB."""

    rank: int
    kinds: dict[str, float]
    """Weights, gradients and so on; their sum is the peak."""
    peak: float


@dataclass(frozen=True)
class Memory:
    """The memory that the ranks of a run held, in GiB, and the capacity of each, if known."""

    ranks: list[RankMemory]
    capacity: float | None

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)


@dataclass(frozen=True)
class Throughput:
    """Tokens or samples per second."""

    unit: str
    median: float
    per_gpu: float
    """The median rate per rank."""
    slowest: float
    slowest_step: int
    mfu: float | None
    """The median share of the peak."""
    peak: dict[str, Any]
    """The peak of a rank's device: `flops` per second, and the `source` of that number."""


@dataclass(frozen=True)
class Descent:
    """When a loss first reached each of the decreasing values: step, and seconds spent in attempts so far."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def reached(self, value: float) -> int | None:
        """The index of the first point that is as low; None if there is none."""
        found = np.flatnonzero(self.values <= value)
        return int(found[0]) if len(found) else None


def memory(view: RunView) -> Memory | None:
    """The latest result of `Trainer.memory`, if it was logged as a table named `memory`."""
    logged = facts.tables(view).get(MEMORY, [])
    columns, rows = facts.table_rows(view, logged[-1]) if logged else ([], [])
    numbers = all(isinstance(cell, int | float) for row in rows for cell in row)
    if not rows or not numbers or len(columns) < 3 or (columns[0], columns[-1]) != ("rank", "peak"):
        return None  # a table of another kind
    kinds = [name.partition(",")[0] for name in columns[1:-1]]
    held = [RankMemory(int(row[0]), dict(zip(kinds, row[1:-1], strict=True)), row[-1]) for row in rows]
    has = next((a.layout.get("memory_bytes") for a in reversed(view.attempts) if a.layout), None)
    return Memory(held, has / 2**30 if has else None)


def throughput(view: RunView) -> Throughput | None:
    """How fast the steps were, according to what was logged from `Trainer.performance`."""
    for unit in ("tokens", "samples"):
        rate = _finite(view.points.get(f"{unit}_per_second"))
        if rate is None:
            continue
        slowest = int(rate.y.argmin())
        per_gpu = _finite(view.points.get(f"{unit}_per_second_per_gpu"))
        mfu = _finite(view.points.get("mfu"))
        peaks = (a.layout["peak"] for a in reversed(view.attempts) if "peak" in a.layout)
        return Throughput(
            unit, _median(rate), _median(per_gpu or rate), float(rate.y[slowest]), int(rate.x[slowest]),
            _median(mfu) if mfu is not None else None, next(peaks, {}),
        )  # fmt: skip
    return None


def gib(count: float) -> str:
    """GiB in words: `62.14 GiB`, `340 MiB`."""
    return f"{count:,.2f} GiB" if count >= 1 else f"{count * 1024:,.0f} MiB"


def of_capacity(rank: RankMemory, capacity: float | None) -> str:
    """`62.14 GiB of 79.10 GiB`, or without the capacity if it is unknown."""
    return f"{gib(rank.peak)} of {gib(capacity)}" if capacity else gib(rank.peak)


def utilisation(found: Throughput) -> str:
    """`41.2% of 989 TFLOP/s (data sheet of H100)`; empty if it was not logged."""
    if found.mfu is None or not found.peak:
        return ""
    flops = found.peak["flops"] / 1e12
    return f"{found.mfu:.1%} of {flops:,.{0 if flops >= 10 else 2}f} TFLOP/s ({found.peak['source']})"


def figures(drawn: Sequence[Figure], views: Sequence[RunView]) -> list[Figure]:
    """The performance figures among those of `plots`, the rates and their shares of the peak first.

    The rates have `levels`, the median of each run, drawn as horizontal lines: {run, y}.
    """
    found = []
    for figure in drawn:
        if not OF_THE_LOOP.fullmatch(figure["title"]):
            continue
        medians = {i: _finite(view.points.get(figure["title"])) for i, view in enumerate(views)}
        levels = [{"run": i, "y": _median(series)} for i, series in medians.items() if series is not None]
        first = not figure["title"].startswith("seconds_") and not figure["title"].endswith("_per_gpu")
        found.append({**figure, "first": first, "levels": levels if first else []})
    return sorted(found, key=lambda figure: (not figure["first"], figure["title"] == "mfu"))


def time_spent(view: RunView) -> dict[str, float]:
    """Seconds by kind, which add up to the time between the start and the latest end.

    Empty until a Trainer has recorded its time, which it does at the first checkpoint or evaluation.
    """
    if not any(attempt.spent for attempt in view.attempts):
        return {}
    total = dict.fromkeys(KINDS, 0.0)
    for index, attempt in enumerate(view.attempts):
        for kind, seconds in _of_attempt(view, attempt, _gone_back_to(view.attempts[index + 1 :])).items():
            total[kind] += max(0.0, seconds)  # a clock may have been set back
    total[BETWEEN] = sum(max(0.0, later.started - _end(a)) for a, later in pairwise(view.attempts))
    return total


def as_json(view: RunView) -> dict[str, Any]:
    """What is known about a run: `throughput`, `memory` in GiB, and `seconds` by what they were spent on."""
    rate, held = throughput(view), memory(view)
    return {
        "throughput": asdict(rate) if rate is not None else None,
        "memory": asdict(held) if held is not None else None,
        "seconds": time_spent(view),
    }


def descent(view: RunView, metric: str) -> Descent | None:
    """How a loss decreased; the training loss, which varies by batch, as the mean of its last points."""
    series = _finite(view.points.get(metric))
    if series is None:
        return None
    values = _mean_of_last(series.y, _SMOOTHED) if metric == "loss" else series.y
    lower = np.flatnonzero(values < np.concatenate([[math.inf], np.minimum.accumulate(values)[:-1]]))
    lower = _spread_by_value(values, lower)
    return Descent(series.x[lower], values[lower], Clock(view).at(series.time[lower]))


def thresholds(descents: Sequence[Descent | None]) -> list[float]:
    """Round losses between the highest start of a run and the lowest loss that a run reached.

    Only losses that runs reached at different times, compared with each other and with the lowest.
    """
    known = [d for d in descents if d is not None]
    if not known:
        return []
    begun, best = max(d.values[0] for d in known), min(d.values[-1] for d in known)
    ways = [float(share * (begun - best)) for share in _ON_THE_WAY]
    found = [_rounded_up(float(best) + way, way) for way in ways if way > 0]
    lowest = tuple(len(d.steps) - 1 for d in known)
    moments = {tuple(d.reached(value) for d in known): value for value in found[::-1] if value < begun}
    return sorted((value for moment, value in moments.items() if moment != lowest), reverse=True)


def _gone_back_to(later: Sequence[AttemptView]) -> float:
    """The last step of an attempt that later attempts did not void."""
    said = (a.resumed_from if a.resumed_from is not None else 0 for a in later if _went_on(a))
    return min(said, default=math.inf)


def _went_on(attempt: AttemptView) -> bool:
    return attempt.resumed_from is not None or attempt.began is not None


def _of_attempt(view: RunView, attempt: AttemptView, back: float) -> dict[str, float]:
    """How the time of one attempt was spent; everything after the step `back` is void."""
    began, end = attempt.began, _end(attempt)
    if began is None:
        return {STARTING: end - attempt.started}
    stands = [record for record in attempt.spent if record["step"] <= back]
    before = [record["seconds"] for record in stands if record["time"] < began]
    over = next((record for record in stands if record["over"]), None)
    last = over or (stands[-1] if stands else None)
    spent = last["seconds"] if last else dict.fromkeys(("waiting", "evaluating", "checkpointing"), 0.0)
    first = before[-1]["evaluating"] if before else 0.0
    until = max(began, last["time"] if last else _last_point(view, attempt, back))
    rest = end - until
    within = spent["waiting"] + spent["evaluating"] - first + spent["checkpointing"]
    found = {
        STARTING: began - attempt.started - first, WAITING: spent["waiting"],
        EVALUATING: spent["evaluating"], CHECKPOINTS: spent["checkpointing"],
        TRAINING: until - began - within,
    }  # fmt: skip
    if over is not None:
        tested = stands[-1]["seconds"]["evaluating"] - over["seconds"]["evaluating"]
        return {**found, EVALUATING: found[EVALUATING] + tested, FINISHING: rest - tested}
    if back < math.inf:
        return {**found, AGAIN: rest}
    return {**found, TRAINING: found[TRAINING] + rest}


def _last_point(view: RunView, attempt: AttemptView, back: float) -> float:
    """When the last valid point was logged, for an attempt that did not record its time."""
    if attempt.spent or back == math.inf:
        return 0.0
    times = [s.time[(s.time >= attempt.started) & (s.time <= _end(attempt))] for s in view.points.values()]
    return max((float(t.max()) for t in times if len(t)), default=0.0)


def _end(attempt: AttemptView) -> float:
    return max(attempt.started, attempt.ended or attempt.last_event)


def _finite(series: Series | None) -> Series | None:
    """The points that are numbers; None if there are none."""
    if series is None:
        return None
    kept = np.isfinite(series.y)
    return Series(series.x[kept], series.y[kept], series.time[kept]) if kept.any() else None


def _median(series: Series) -> float:
    return float(np.median(series.y))


def _mean_of_last(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """At every index the mean of the last so many values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(1, len(values) + 1)
    begins = np.maximum(0, places - count)
    means: NDArray[np.float64] = (sums[places] - sums[begins]) / (places - begins)
    return means


def _spread_by_value(values: NDArray[np.float64], lower: NDArray[np.int64]) -> NDArray[np.int64]:
    """A thinned set of the indices where values decrease, enough for a page to look up any value between."""
    if len(lower) <= _MOST_STAIRS:
        return lower
    wanted = np.linspace(values[lower[0]], values[lower[-1]], _MOST_STAIRS)
    kept = np.unique(np.searchsorted(-values[lower], -wanted))
    return lower[np.minimum(kept, len(lower) - 1)]


def _rounded_up(value: float, unit: float) -> float:
    """Round up to a multiple of the largest power of ten that is not above `unit`."""
    digits = -math.floor(math.log10(unit))
    return round(math.ceil(value * 10.0**digits - 1e-9) / 10.0**digits, max(0, digits))
