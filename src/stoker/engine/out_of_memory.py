"""Running out of memory, however it is said: torch has an exception of its own for GPUs alone."""

from __future__ import annotations

import psutil
import torch

KINDS = (RuntimeError, MemoryError)
"""What may be one; `is_one` tells. `torch.OutOfMemoryError` is a RuntimeError."""
_ON_A_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_one(error: BaseException) -> bool:
    """Whether memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _ON_A_CPU in str(error)


def said(error: BaseException) -> str:
    """What was asked for, and what was free, on one line."""
    text = str(error).partition(" If reserved")[0].strip()
    if isinstance(error, torch.OutOfMemoryError):
        return text.splitlines()[0]
    asked = text.partition("you tried to allocate ")[2].partition(".")[0]
    free = psutil.virtual_memory().available / 2**30
    return f"{f'{asked} were asked for, and ' if asked else ''}{free:,.1f} GiB of memory are free."
