"""Running out of memory: torch has a dedicated exception only for GPUs."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator

import psutil
import torch
from stoker import words

_ON_A_CPU = "DefaultCPUAllocator: can't allocate memory"
_ASKED = re.compile(r"Tried to allocate ([\d.,]+) ([KMG]iB)")  # torch's text for a GPU, ours for a CPU
_CODE = psutil.Process().memory_info().rss
"""Bytes of a process that has loaded its modules, but no model."""
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within this block, running out of memory raises `torch.OutOfMemoryError` on CPUs too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and _ON_A_CPU not in str(error):
            raise
        raise torch.OutOfMemoryError(_message(error)) from error


def said(error: BaseException, rank: int) -> str:
    """The rank, what was requested and what was free, as one line that ends with a full stop."""
    line = str(error).partition(" If reserved")[0].splitlines()[0].rstrip()
    return f"out of memory on rank {rank}: {line.removesuffix('.')}."


def numbers(error: BaseException, device: torch.device) -> tuple[float, float, float]:
    """Bytes that were requested (0 if the error does not say), that are free, and that the model holds.

    Call it before the memory of the failed pass is released.
    """
    asked = _ASKED.search(str(error))
    wanted = float(asked[1].replace(",", "")) * _UNITS[asked[2]] if asked else 0.0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return wanted, float(free), float(held)
    return wanted, _free(), max(0.0, float(psutil.Process().memory_info().rss - _CODE))


def _message(error: BaseException) -> str:
    asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
    wanted = f"Tried to allocate {words.size(int(asked[1]))}. " if asked else ""
    return f"{wanted}{words.size(_free())} of memory are free."


def _free() -> float:
    """Bytes that this process may still use: free on the machine, and below its own limit."""
    found = float(psutil.virtual_memory().available)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found = min(found, limit - psutil.Process().memory_info().vms)
    return max(0.0, found)
