"""How fast a training loop runs, and where its time goes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

_WINDOW = 20  # steps


class Rate:
    """Steps per second over the last steps, excluding time spent on anything else."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds: list[float] = []
        self._clock = clock
        self._mark = clock()

    def restart(self) -> None:
        """Exclude everything since the last mark."""
        self._mark = self._clock()

    def leave_out(self, seconds: float) -> None:
        """Exclude this much of the time since the last step."""
        self._mark += seconds

    def step(self) -> None:
        """Record that a step has finished."""
        now = self._clock()
        self._seconds = [*self._seconds[-_WINDOW + 1 :], now - self._mark]
        self._mark = now

    @property
    def steps_per_second(self) -> float | None:
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None


class Pace:
    """The timing of one attempt's loop.

    Args:
        ranks: the number of ranks that share the work.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._rate = Rate()
        self._began = math.inf
        self._units_per_step: float | None = None
        self.unit = "samples"
        """The unit that is counted: `tokens` or `samples`."""
        self.waited = 0.0
        """Seconds spent waiting for batches."""
        self._spent = {"evaluating": 0.0, "checkpointing": 0.0}

    def count(self, samples_per_step: int, tokens_per_sample: float | None) -> None:
        """Set what a step consists of: tokens if the dataset counts them, else samples."""
        self.unit = "samples" if tokens_per_sample is None else "tokens"
        self._units_per_step = samples_per_step * (tokens_per_sample or 1.0)

    def begin(self) -> None:
        """The first step begins."""
        self._began = time.perf_counter()
        self._rate.restart()

    def step(self) -> None:
        """Record that a step has finished."""
        self._rate.step()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time waiting for the next batch, which is part of a step."""
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Exclude this block from the steps, and record its time separately."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._spent[what] += seconds
        self._rate.leave_out(seconds)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds spent so far on anything but computing steps."""
        return {"waiting": self.waited, **self._spent}

    @property
    def share_waited(self) -> float:
        """The share of time since the first step began that was spent waiting for batches."""
        return self.waited / (time.perf_counter() - self._began)

    @property
    def rate(self) -> float | None:
        """Units per second over all ranks, over the last steps; None if not known yet."""
        steps = self._rate.steps_per_second
        return None if steps is None or self._units_per_step is None else steps * self._units_per_step

    @property
    def rate_of_a_rank(self) -> float | None:
        """Units per second of one rank."""
        return None if self.rate is None else self.rate / self._ranks

    def seconds_for(self, steps: int) -> float | None:
        """The estimated time for this many more steps."""
        rate = self._rate.steps_per_second
        return steps / rate if rate else None

    def metrics(self) -> dict[str, float]:
        """All metrics for logging; empty if the rate is not known yet."""
        rate, of_a_rank = self.rate, self.rate_of_a_rank
        if rate is None or of_a_rank is None:
            return {}
        found = {f"{self.unit}_per_second": rate, f"{self.unit}_per_second_per_gpu": of_a_rank}
        spent = {"waiting_for_data": self.waited, **self._spent}
        return {**found, **{f"seconds_{what}": seconds for what, seconds in spent.items()}}
