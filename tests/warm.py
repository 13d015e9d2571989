"""One forkserver for all tests that start processes, which has imported already what they use.

A process has a single forkserver, with the modules and the environment of whoever asks for it
first: so it is asked for before the first test.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerProcess
from typing import Any

from stoker.tracking import store

CONTEXT = multiprocessing.get_context("forkserver")
_MODULES = [
    "pytest",
    "torch",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "stoker.loop",
    "stoker.tracking.mlflow_sink",
    "synthetic_run",
    "ranks",
]


def start() -> None:
    """Start it; it imports while the tests begin."""
    # A shell ignores SIGINT for what it runs in the background, and so would the processes started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(store.QUIET, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", STOKER_SINKS="none")
    CONTEXT.set_forkserver_preload(_MODULES)
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # what is imported has much to say
        os.dup2(nowhere, number)
    try:
        forkserver.ensure_running()
    finally:
        for number, file in enumerate(kept, start=1):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)


def process(target: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """A process, not yet started, with this one's environment and output as they are now."""
    return CONTEXT.Process(target=_with, args=(_Output(), dict(os.environ), target, arguments))


class _Output:
    """Standard output and error of the process that starts another; becomes those of the other."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (reduction.DupFd(1), reduction.DupFd(2))


def _take(*files: Any) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file.detach(), number)


def _with(
    output: None, environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)
