"""How fast a training loop is, and where its time goes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator


class Rate:
    """Steps a second over the last steps, leaving out time spent on anything else."""

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds: list[float] = []
        self._window, self._clock = window, clock
        self._mark = clock()

    def restart(self) -> None:
        """What went on since the last mark was not a step."""
        self._mark = self._clock()

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last step was spent on something else."""
        self._mark += seconds

    def step(self) -> None:
        """A step is done."""
        now = self._clock()
        self._seconds = [*self._seconds[-self._window + 1 :], now - self._mark]
        self._mark = now

    @property
    def steps_per_second(self) -> float | None:
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None


class Pace:
    """The time of one attempt's loop.

    Args:
        ranks: those that share its work.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._rate = Rate()
        self._began = math.inf
        self._units_per_step: float | None = None
        self.unit = "samples"
        """What is counted: `tokens`, or `samples`."""
        self.waited = 0.0
        """Seconds that it waited for batches."""
        self._spent = {"evaluating": 0.0, "checkpointing": 0.0}

    def count(self, samples_per_step: int, tokens_per_sample: float | None) -> None:
        """What a step is of: tokens, where the dataset counts them."""
        self.unit = "samples" if tokens_per_sample is None else "tokens"
        self._units_per_step = samples_per_step * (tokens_per_sample or 1.0)

    def begin(self) -> None:
        """The first step begins."""
        self._began = time.perf_counter()
        self._rate.restart()

    def step(self) -> None:
        """A step is done."""
        self._rate.step()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The next batch is waited for, which is part of a step."""
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """What is done within is no part of a step, and its time is told apart."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._spent[what] += seconds
        self._rate.leave_out(seconds)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds so far that were spent on anything but computing steps."""
        return {"waiting": self.waited, **self._spent}

    @property
    def share_waited(self) -> float:
        """Of the time since the first step began, the share that batches were waited for."""
        return self.waited / (time.perf_counter() - self._began)

    @property
    def rate(self) -> float | None:
        """Units a second over all ranks, over the last steps; None where that is not known yet."""
        steps = self._rate.steps_per_second
        return None if steps is None or self._units_per_step is None else steps * self._units_per_step

    @property
    def rate_of_a_rank(self) -> float | None:
        """As `rate`, of one rank."""
        return None if self.rate is None else self.rate / self._ranks

    def seconds_for(self, steps: int) -> float | None:
        """How long so many more steps will take."""
        rate = self._rate.steps_per_second
        return steps / rate if rate else None

    def metrics(self) -> dict[str, float]:
        """All of it, to be logged; empty where the rate is not known yet."""
        rate, of_a_rank = self.rate, self.rate_of_a_rank
        if rate is None or of_a_rank is None:
            return {}
        found = {f"{self.unit}_per_second": rate, f"{self.unit}_per_second_per_gpu": of_a_rank}
        spent = {"waiting_for_data": self.waited, **self._spent}
        return {**found, **{f"seconds_{what}": seconds for what, seconds in spent.items()}}
