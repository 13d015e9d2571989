"""The domain of a searched value: a range of numbers or a list of choices."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BARE = re.compile(r"[\w.+/:@-]+")  # a text that needs no quotes in a list


@dataclass(frozen=True)
class Number:
    """A range of numbers, both ends included: uniform, uniform on a log scale, or in steps from `low`.

    Raises ValueError for an invalid range.
    """

    low: float | int
    high: float | int
    integer: bool
    log: bool = False
    step: float | int | None = None

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: write {self.high}, {self.low}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low}: a log range needs a low above 0")
        if self.step is None:
            return
        if self.log:
            raise ValueError("a log range cannot have a step: leave out one of the two")
        if self.step <= 0:
            raise ValueError(f"step {self.step}: must be above 0")
        if self._at(self._steps) != self.high:
            below, above = self._at(self._steps), self._at(self._steps + 1)
            raise ValueError(
                f"steps of {self.step} from {self.low} reach {below} and {above}, not {self.high}: "
                f"use one of these as high, or change the step"
            )

    @property
    def grain(self) -> float | int | None:
        """The distance between neighbouring values, or None for a continuous range."""
        return self.step or (1 if self.integer else None)

    @property
    def points(self) -> list[float | int] | None:
        """Every value in order, as Optuna represents it, or None if there are infinitely many."""
        if self.low == self.high:
            return [self.low]
        return None if self.grain is None else [self._at(k) for k in range(self._steps + 1)]

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        slack = 1e-9 * self.step if self.step and not self.integer else 0.0  # 0.1 + 0.2 is a step of 0.1
        return abs(self.nearest(value) - value) <= slack

    def nearest(self, value: float | int) -> float | int:
        """The value in the range nearest to a number."""
        inside = min(max(value, self.low), self.high)
        if self.grain is None:
            return float(inside)
        return self._at(round((_exact(inside) - _exact(self.low)) / _exact(self.grain)))

    def suggested(self, trial: Any, name: str) -> float | int:
        """Draw from an optuna trial. A value that was enqueued outside the range is returned as it is."""
        if self.integer:
            step = int(self.step or 1)
            value: float | int = int(trial.suggest_int(name, self.low, self.high, step=step, log=self.log))
        else:
            value = float(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log))
        # Optuna adds steps in binary and gives 0.30000000000000004: `nearest` gives the 0.3 that was meant.
        return self.nearest(value) if self.holds(value) else value

    def drawn(self, random: np.random.Generator) -> float | int:
        """Draw a value; an integer on a log scale has the probability of what rounds to it, as in Optuna."""
        if self.log:
            edge = 0.5 if self.integer else 0.0
            low, high = math.log(self.low - edge), math.log(self.high + edge)
            return self.nearest(math.exp(random.uniform(low, high)))
        if self.grain is None:
            return self.nearest(float(random.uniform(self.low, self.high)))
        return self._at(int(random.integers(self._steps + 1)))

    def moved(
        self, value: float | int, random: np.random.Generator, factors: tuple[float, float]
    ) -> float | int:
        """A value times one of the factors, within the range, moved by at least one step if it has steps."""
        factor = factors[int(random.integers(len(factors)))]
        moved = self.nearest(value * factor)
        if self.grain is None or factor == 1 or moved != self.nearest(value):
            return moved
        up = value * factor > value or (value == 0 and factor > 1)
        return self.nearest(value + (self.grain if up else -self.grain))

    def param(self, value: float | int) -> float | int:
        """A value as optuna takes it."""
        return value

    @property
    def _steps(self) -> int:
        return int((_exact(self.high) - _exact(self.low)) // _exact(self.grain or 1))

    def _at(self, k: int) -> float | int:
        value = _exact(self.low) + k * _exact(self.grain or 1)
        return int(value) if self.integer else float(value)

    def __str__(self) -> str:
        kind = "int" if self.integer else "log" if self.log else "uniform"
        step = "" if self.step is None else f", step={self.step}"
        return f"{kind}({self.low}, {self.high}{', log' if self.log and self.integer else ''}{step})"


@dataclass(frozen=True)
class Choice:
    """One of several values, as a config's record holds them; for paired keys each value is a tuple.

    Raises ValueError if there are no values, or one is listed twice.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("the list of choices is empty: write [a, b]")
        points = self.points
        for i, point in enumerate(points):
            if point in points[:i]:
                raise ValueError(f"{item(self.values[i])} is listed twice: remove one of them")

    @property
    def points(self) -> list[bool | int | float | str | None]:
        """Every value in order, as optuna takes it: lists and rows of paired keys as text."""
        return [self.param(value) for value in self.values]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the choices."""
        return value in self.values

    def suggested(self, trial: Any, name: str) -> Any:
        """Draw from an optuna trial."""
        return self.values[self.points.index(trial.suggest_categorical(name, self.points))]

    def drawn(self, random: np.random.Generator) -> Any:
        """Draw anew."""
        return self.values[int(random.integers(len(self.values)))]

    def moved(self, value: Any, random: np.random.Generator, factors: tuple[float, float]) -> Any:
        """A neighbour of a value in the list; a value that is not in the list is replaced by a new draw."""
        if value not in self.values:
            return self.drawn(random)
        at = self.values.index(value)
        neighbours = self.values[max(0, at - 1) : at] + self.values[at + 1 : at + 2]
        return neighbours[int(random.integers(len(neighbours)))] if neighbours else value

    def param(self, value: Any) -> bool | int | float | str | None:
        """A value as optuna takes it."""
        return value if value is None or isinstance(value, bool | int | float | str) else item(value)

    def __str__(self) -> str:
        return f"[{', '.join(map(item, self.values))}]"


def text(value: Any) -> str:
    """A value as written after `key=`."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def item(value: Any) -> str:
    """A value as written in a list of choices."""
    if isinstance(value, tuple):
        return f"({', '.join(map(item, value))})"
    if isinstance(value, str) and not _BARE.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    return text(value)


def _exact(value: float | int) -> Decimal:
    """A number at its decimal value: 0.1 is exactly a tenth."""
    return Decimal(str(value))
