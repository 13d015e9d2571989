"""Running out of memory: torch has an exception of its own for GPUs alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch

_ON_A_CPU = "DefaultCPUAllocator: can't allocate memory"


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What is raised within this block for want of memory is a `torch.OutOfMemoryError`, on CPUs too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and _ON_A_CPU not in str(error):
            raise
        raise torch.OutOfMemoryError(_said(error)) from error


def _said(error: BaseException) -> str:
    """What was asked for, and what was free, on one line."""
    asked = str(error).partition("you tried to allocate ")[2].partition(".")[0]
    free = psutil.virtual_memory().available / 2**30
    return f"{f'{asked} were asked for, and ' if asked else ''}{free:,.1f} GiB of memory are free."
