"""How long the steps of a loop take on this rank, what of that it waits for, and its peak of memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from stoker.engine import memory, profiling

_WARM_UP = 5  # steps that are not counted: compilation, caches, the optimizer's first state
_PROFILED = 3  # steps after the timed ones, under the profiler, to see what is communication


def needed(steps: int) -> int:
    """How many steps a run must have for so many to be timed."""
    return _WARM_UP + steps + _PROFILED


@dataclass(frozen=True)
class Timed:
    """What was measured on one rank."""

    steps: int
    seconds: float
    """Of all steps together."""
    waited: float
    """Seconds of these that it waited for batches."""
    communicated: float
    """Share of the time in which a collective was under way, beside computation or not, of profiled steps."""
    peak_bytes: int


class Timing:
    """Times `steps` steps after a warm-up, then profiles a few more."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._done = 0
        self._begun = self._ended = self._waited = self._profiled = 0.0
        self._profile = profiling.recorder(device)

    def step(self, waited: float) -> Timed | None:
        """After each step, with the seconds waited for batches so far; the result after the last one."""
        self._done += 1
        if self._done == _WARM_UP:
            self._begun, self._waited = self._now(), waited
        if self._done == _WARM_UP + self._steps:
            self._ended, self._waited = self._now(), waited - self._waited
            self._profile.start()
            self._profiled = self._now()
        if self._done < needed(self._steps):
            return None
        profiled = self._now() - self._profiled
        self._profile.stop()
        return Timed(
            self._steps, self._ended - self._begun, self._waited, self._communicated() / profiled,
            memory.peak(self._device),
        )  # fmt: skip

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _communicated(self) -> float:
        """Seconds in which at least one was under way: NCCL's kernels on a GPU, else gloo's operations."""
        events = self._profile.events() or ()  # type: ignore[no-untyped-call]
        on_gpu = self._device.type == "cuda"  # where gloo carries a few numbers beside the work
        names = ("ncclDevKernel", "ncclKernel") if on_gpu else ("gloo:",)
        ranges = sorted(
            (event.time_range.start, event.time_range.end) for event in events if event.name.startswith(names)
        )
        spent, until = 0.0, 0.0
        for start, end in ranges:
            spent += max(0.0, end - max(start, until))
            until = max(until, end)
        return spent / 1e6
