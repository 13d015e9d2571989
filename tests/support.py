"""Reading a run from outside while it is trained, as the tests that kill it do; what GPUs need."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import psutil
import pytest
import torch
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.run.series import Series
from stoker.run.state import RunView

T = TypeVar("T")


class Ending(Protocol):
    """A process, of whichever kind."""

    def poll(self) -> int | None: ...

    def communicate(self) -> tuple[bytes, bytes]: ...


SOAK = bool(os.environ.get("STOKER_SOAK"))
"""`make soak`: the long form of what is marked so, where CI runs a short one."""

LONG = 240.0
"""Seconds that a test waits for what should come: far more than it takes on the slowest machine."""

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever would wait for the GPU within this block is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def until(holds: Callable[[], T], *of: Ending, within: float = LONG, every: float = 0.05) -> T:
    """Wait until a function returns something true, and return that.

    Args:
        of: processes that it is to come of: one that has ended before is an error.
        within: seconds that it may take, where a test is about that.
        every: seconds between two calls; more for a function that takes CPU from what is waited for.
    """
    deadline = time.monotonic() + within
    while not (found := holds()):
        assert time.monotonic() < deadline
        for process in of:
            assert process.poll() is None, process.communicate()
        time.sleep(every)
    return found


def points(run: Path) -> int:
    """Metric events in a run's journal so far."""
    return sum(file.read_bytes().count(b'"type":"metrics"') for file in run.glob("journal/*.jsonl"))


def wait_for_points(process: subprocess.Popen[bytes], run: Path, more: int) -> None:
    """Wait until a process has logged so many more points, or has ended."""
    target = points(run) + more
    while points(run) < target and process.poll() is None:
        time.sleep(0.005)


def slow_from(step: int, pause: float = 1.0) -> str:
    """What `start` executes `first`, for a process that pauses after all that it logs from a step on.

    So it is still there for what a test does to it then, however late that is. Its config is the one of a
    process that does not pause, which may go on with the run.
    """
    return _SLOW.format(step=step, pause=pause)


_SLOW = """
import time
from stoker.user_run import Run

log = Run.log

def slowly(run, *values, **named):
    log(run, *values, **named)
    if run.step >= {step}:
        time.sleep({pause})

Run.log = slowly
"""


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    return _in_mask(pid, "SigCgt:", number)


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to a process that has not taken it yet; of several it takes one."""
    return _in_mask(pid, "ShdPnd:", number)


def _in_mask(pid: int, mask: str, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition(mask)[2].split()[0], 16) >> (number - 1) & 1)


def suspend(pid: int) -> None:
    """Suspend a process, and wait until it stands still: until then it may take another signal first."""
    process = psutil.Process(pid)
    process.suspend()
    until(lambda: process.status() == psutil.STATUS_STOPPED)


def loaded(run: Path) -> RunView:
    return view.load(RunDirectory(run))


def series(**points: dict[int, float]) -> dict[str, Series]:
    """Metrics as a view has them, from step -> value; logged at time 0."""
    return {
        metric: Series(np.array(list(of), np.int64), np.array(list(of.values())), np.zeros(len(of)))
        for metric, of in points.items()
    }
