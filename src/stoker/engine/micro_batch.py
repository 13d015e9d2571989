"""Finds the largest micro-batch that fits into memory by trying, and remembers it.

Sizes that divide a rank's share of the batch, and suit a pipeline's schedule, are tried from the smallest
up. Before each attempt its memory is extrapolated from the last two, so that running out of memory is rare:
a rank that does so in the middle of a collective would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from stoker import distributed, storage
from stoker.engine import out_of_memory
from stoker.errors import StokerError

_ROOM = 0.9  # of a device's memory


def find(
    sizes: Sequence[int],
    attempt: Callable[[int], None],
    device: torch.device,
    *,
    memory: Path,
    about: Mapping[str, Any],
) -> int:
    """The largest size that fits; the same on every rank.

    Args:
        sizes: the candidates, smallest first.
        attempt: runs a forward and backward pass in micro-batches of a size.
        device: the device whose memory it must fit into.
        memory: the file in which results are remembered, keyed by everything in `about`.

    Raises:
        StokerError: not even one sample fits.
    """
    known = distributed.from_rank_zero(storage.remembered(memory, about))
    if known in sizes:
        return int(known)
    found = largest(sizes, attempt, device)
    if found is None:
        raise StokerError(
            "micro_batch=auto: not even one sample fits into memory; "
            "set activation_checkpointing=full, or parallel=fsdp over more ranks"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        remember(found, memory=memory, about=about)
    return found


def remember(size: int, *, memory: Path, about: Mapping[str, Any]) -> None:
    """Remember a size for `find`."""
    storage.remember(memory, about, size)


def of_pipeline(sizes: Sequence[int], share: int, ranks: int) -> int:
    """The default micro-batch of a pipeline: at least four per rank, so that ranks rarely wait."""
    enough = [n for n in sizes if share // n >= 4 * ranks]
    return max(enough, default=min(sizes))


def largest(sizes: Sequence[int], attempt: Callable[[int], None], device: torch.device) -> int | None:
    """Like `find`, but without remembering the result; None if no size fits."""
    tried: list[tuple[int, int]] = []  # samples, bytes at the peak
    for size in sizes:
        if _over_ranks(_foreseen(tried, size) > _ROOM * _total(device)):
            break
        _reset_peak(device)
        try:
            with out_of_memory.as_on_a_gpu():
                attempt(size)
            failed = False
        except torch.OutOfMemoryError:
            failed = True
        if _over_ranks(failed):
            break
        tried.append((size, _peak(device)))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tried[-1][0] if tried else None


def _foreseen(tried: list[tuple[int, int]], size: int) -> float:
    """The peak of a size, extrapolated linearly from the last two attempts."""
    if len(tried) < 2:
        return 0.0
    (a, at_a), (b, at_b) = tried[-2:]
    return at_b + max(0, at_b - at_a) / (b - a) * (size - b)


def _over_ranks(yes: bool) -> bool:
    """Whether it is true on any rank."""
    return any(distributed.gathered(yes))


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.Process().memory_info().rss + psutil.virtual_memory().available)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Bytes at the peak of the last attempt; on a CPU, the size that the process has grown to."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return int(psutil.Process().memory_info().rss)
