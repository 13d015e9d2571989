"""Running out of memory: torch has an exception of its own for GPUs alone."""

from __future__ import annotations

import contextlib
import re
import resource
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
    asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
    wanted = f"{int(asked[1]) / 2**30:,.1f} GiB were asked for, and " if asked else ""
    return f"{wanted}{_free() / 2**30:,.1f} GiB of memory are free."


def _free() -> float:
    """Bytes that this process may still have: of the machine, and below its own limit."""
    found = float(psutil.virtual_memory().available)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found = min(found, limit - psutil.Process().memory_info().vms)
    return max(0.0, found)
