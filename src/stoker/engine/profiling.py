"""`--profile 10:15`: a trace of some steps by torch's profiler, and a table of where the time went."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("stoker")

_ROWS = 15


class Profiler:
    """Profiles steps `first` to `last` (counted from 1), each rank its own.

    Writes `profile-rank-N.json`, which Perfetto and chrome://tracing open, and `profile-rank-N.txt`.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._profile: profile | None = None
        if steps is not None and steps[0] <= 1:
            self._start()

    def step(self, done: int) -> None:
        """After step `done`: start before the first step that is wanted, stop after the last."""
        if self._steps is None:
            return
        if self._profile is None and self._steps[0] - 1 <= done < self._steps[1]:
            self._start()
        elif self._profile is not None and done >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profile is None:
            return
        self._profile.stop()
        name = self._folder / f"profile-rank-{self._rank}"
        self._profile.export_chrome_trace(str(name.with_suffix(".json")))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=50)
        name.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
        if self._rank == 0:
            log.info("profiled: %s opens in ui.perfetto.dev\n%s", name.with_suffix(".json"), table)
        self._profile = None
        self._steps = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
