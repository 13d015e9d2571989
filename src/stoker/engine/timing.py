"""Measures step times on this rank, how much of that is waiting, and peak memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from stoker.engine import memory, profiling

_WARM_UP = 5  # steps that are not counted: compilation, caches, the initial optimizer state
_PROFILED = 3  # steps after the timed ones, profiled to measure communication


def needed(steps: int) -> int:
    """The number of steps that a run needs for this many to be timed."""
    return _WARM_UP + steps + _PROFILED


@dataclass(frozen=True)
class Timed:
    """The measurements of one rank."""

    steps: int
    seconds: float
    """For all steps together."""
    waited: float
    """Seconds of these spent waiting for batches."""
    communicated: float
    """Share of the profiled time in which a collective was running, overlapping computation or not."""
    peak_bytes: int


class Timing:
    """Times `steps` steps after a warm-up, then profiles a few more."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._done = 0
        self._begun = self._ended = self._waited = self._profiled = 0.0
        self._profile = profiling.recorder(device)

    def step(self, waited: float) -> Timed | None:
        """Call after each step, with the seconds waited for batches so far; returns the result at the end."""
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
        """Seconds in which at least one collective ran: NCCL kernels on a GPU, else gloo operations."""
        events = self._profile.events() or ()  # type: ignore[no-untyped-call]
        on_gpu = self._device.type == "cuda"  # where gloo carries only a few numbers
        names = ("ncclDevKernel", "ncclKernel") if on_gpu else ("gloo:",)
        ranges = sorted(
            (event.time_range.start, event.time_range.end) for event in events if event.name.startswith(names)
        )
        spent, until = 0.0, 0.0
        for start, end in ranges:
            spent += max(0.0, end - max(start, until))
            until = max(until, end)
        return spent / 1e6
