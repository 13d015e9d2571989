"""`--profile 10:15`: a trace of some steps by torch's profiler, and a table of where the time went."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("stoker")

_ROWS = 12


def recorder(device: torch.device) -> profile:
    """A profiler of the CPU, and of the GPU if that is the device."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to standard error
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


class Profiler:
    """Profiles steps `first` to `last` (counted from 1) on each rank.

    Writes `profile-rank-N.json`, which Perfetto and chrome://tracing can open, and `profile-rank-N.txt`.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._profile: profile | None = None
        if steps is not None and steps[0] <= 1:
            self._start()

    def step(self, done: int) -> None:
        """After step `done`: start before the first step to profile, stop after the last."""
        if self._steps is None:
            return
        if self._profile is None and self._steps[0] - 1 <= done < self._steps[1]:
            self._start()
        elif self._profile is not None and done >= self._steps[1]:
            self._write()

    def close(self) -> None:
        """Write what was recorded; warn if the loop ended before anything was recorded."""
        if self._profile is not None:
            self._write()
        elif self._steps is not None and self._rank == 0:
            log.warning(
                "nothing was profiled: the loop ended before step %d, or started after it", self._steps[0]
            )

    def _write(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        name = self._folder / f"profile-rank-{self._rank}"
        self._profile.export_chrome_trace(str(name.with_suffix(".json")))
        averages = self._profile.key_averages()
        table = summary(averages, gpu=self._device.type == "cuda")
        name.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
        if self._rank == 0:
            log.info("profiled: open %s in ui.perfetto.dev\n%s", name.with_suffix(".json"), table)
        self._profile = None
        self._steps = None

    def _start(self) -> None:
        self._profile = recorder(self._device)
        self._profile.start()


def summary(averages: Any, *, gpu: bool) -> str:
    """The operations that took the most time themselves, in 90 columns.

    Args:
        averages: `key_averages()` of a profile.
        gpu: whether to rank by time on the GPU.
    """
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    whole = sum(getattr(event, key) for event in averages) or 1.0
    most = sorted(averages, key=lambda event: -getattr(event, key))[:_ROWS]
    lines = [f"  {'operation':56} {'calls':>7} {'own time':>12} {'share':>7}"]
    for event in most:
        own = getattr(event, key)
        lines.append(f"  {_short(event.key):56} {event.count:7,} {own / 1e3:9,.1f} ms {own / whole:7.1%}")
    return "\n".join([*lines, f"  {'all of them together':56} {'':7} {whole / 1e3:9,.1f} ms"])


def _short(name: str, width: int = 56) -> str:
    """A name shortened in the middle: forward and backward of an operation differ at the end."""
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"
