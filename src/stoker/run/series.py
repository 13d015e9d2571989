"""A metric's points as columns; their summary: last, lowest, highest, best; the best of several metrics."""

from __future__ import annotations

import re
from array import array
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Goal: TypeAlias = Literal["min", "max"]

_BETTER_LOW = ("loss", "perplexity", "error", "mae", "mse", "rmse", "wer")
_BETTER_HIGH = (
    "accuracy",
    "acc",
    "f1",
    "auc",
    "auroc",
    "precision",
    "recall",
    "bleu",
    "rouge",
    "reward",
    "iou",
)
_SETTINGS = ("scale", "weight", "weights", "bits")
"""Last words of names that are settings of a measure, not measures: `loss_scale`."""

OF_THE_LOOP = re.compile(
    r"(tokens|samples)_per_second(_per_gpu)?|mfu|seconds_(waiting_for_data|evaluating|checkpointing)"
)
"""Matches the names of the metrics from `Trainer.performance`."""
_OF_THE_MACHINE = ("second", "seconds", "milliseconds", "throughput", "mfu")


class Series(Mapping[int, float]):
    """A mapping from step to value, in the order of steps, stored as columns.

    `x` are the steps (int64, ascending), `y` the values (float64), `time` when each was logged (float64,
    seconds since 1970).
    """

    def __init__(self, x: NDArray[np.int64], y: NDArray[np.float64], time: NDArray[np.float64]) -> None:
        self.x = x
        self.y = y
        self.time = time

    def __getitem__(self, step: int) -> float:
        index = int(np.searchsorted(self.x, step))
        if index == len(self.x) or self.x[index] != step:
            raise KeyError(step)
        return float(self.y[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self.x.tolist())

    def __len__(self) -> int:
        return len(self.x)

    def items(self) -> ItemsView[int, float]:
        return dict(zip(self.x.tolist(), self.y.tolist(), strict=True)).items()

    def values(self) -> ValuesView[float]:
        return dict(self.items()).values()

    def until(self, step: int) -> float:
        """The newest value at or before a step. Raises KeyError if there is none."""
        return self.newest(step)[1]

    def newest(self, step: int) -> tuple[int, float]:
        """The newest point at or before a step: its step and value. Raises KeyError if there is none."""
        index = int(np.searchsorted(self.x, step, side="right"))
        if index == 0:
            raise KeyError(step)
        return int(self.x[index - 1]), float(self.y[index - 1])

    def __repr__(self) -> str:
        return f"Series({dict(self.items())})"


class Columns:
    """Collects points as they were logged, in any order of steps, for a `Series`."""

    def __init__(self) -> None:
        self._x, self._y, self._time = array("q"), array("d"), array("d")

    def append(self, step: int, value: float, time: float) -> None:
        """Add a point. Raises OverflowError for a step beyond 64 bits."""
        self._x.append(step)
        self._y.append(value)
        self._time.append(time)

    def void_after(self, step: int) -> None:
        """Drop all points after a step."""
        kept = np.frombuffer(self._x, np.int64) <= step
        if not kept.all():
            for column, kind in ((self._x, np.int64), (self._y, np.float64), (self._time, np.float64)):
                left = np.frombuffer(column, kind)[kept].tobytes()
                del column[:]
                column.frombytes(left)

    def series(self) -> Series:
        """The points in the order of steps; if a step has several, the first one stands."""
        x = np.array(self._x, np.int64)
        y, time = np.array(self._y, np.float64), np.array(self._time, np.float64)
        if len(x) > 1 and not (x[1:] > x[:-1]).all():
            x, first = np.unique(x, return_index=True)
            y, time = y[first], time[first]
        return Series(x, y, time)


@dataclass(frozen=True)
class Summary:
    """The summary of a metric. NaN and infinities count as points, but are never lowest, highest or best."""

    last: float
    last_step: int
    points: int
    non_finite: int
    min: float | None
    min_step: int | None
    max: float | None
    max_step: int | None
    goal: Goal | None
    """Whether lower or higher is better; None if it was not set and the name does not tell."""

    @property
    def best(self) -> float | None:
        return self.min if self.goal == "min" else self.max if self.goal == "max" else None

    @property
    def best_step(self) -> int | None:
        return self.min_step if self.goal == "min" else self.max_step if self.goal == "max" else None

    def facts(self) -> dict[str, float | int | str | None]:
        """Everything by name, for JSON."""
        return {**vars(self), "best": self.best, "best_step": self.best_step}


def summarise(name: str, series: Series, goals: Mapping[str, Goal]) -> Summary:
    """The summary of a metric with at least one point; of equal values the earliest counts."""
    finite = np.flatnonzero(np.isfinite(series.y))
    low = int(finite[np.argmin(series.y[finite])]) if len(finite) else None
    high = int(finite[np.argmax(series.y[finite])]) if len(finite) else None
    return Summary(
        last=float(series.y[-1]),
        last_step=int(series.x[-1]),
        points=len(series),
        non_finite=len(series) - len(finite),
        min=None if low is None else float(series.y[low]),
        min_step=None if low is None else int(series.x[low]),
        max=None if high is None else float(series.y[high]),
        max_step=None if high is None else int(series.x[high]),
        goal=goal_of(name, goals),
    )


def pareto_front(values: Mapping[int, Sequence[float]]) -> list[int]:
    """The keys of the values than which no others are as good in all objectives, and better in some.

    Args:
        values: of each objective, by key; smaller is better.
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [key for key, own in values.items() if not any(dominates(one, own) for one in values.values())]


def goal_of(name: str, said: Mapping[str, Goal]) -> Goal | None:
    """Whether lower or higher is better: as set in `said`, else by the name; None if neither tells."""
    return said.get(name) or guess_goal(name)


def guess_goal(name: str) -> Goal | None:
    """Whether lower or higher is better, by the name: lower for a `loss`, higher for an `accuracy`."""
    words = _words(name)
    if words[-1] in _SETTINGS:
        return None
    if any(word in words for word in _BETTER_LOW) or words[-1].endswith("loss"):
        return "min"
    return "max" if any(word in words for word in _BETTER_HIGH) else None


def measures_machine(name: str) -> bool:
    """Whether a metric, by its name, measures time or the machine, so that it differs between equal runs."""
    return any(word in _OF_THE_MACHINE for word in _words(name))


def _words(name: str) -> list[str]:
    return name.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
