"""A loss that tells of a broken step: not finite, or far above what it was of late."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable

_WINDOW = 100  # steps whose median a spike is measured by
_ENOUGH = 10


class LossWatch:
    """Judges the losses of a run, one after the other; the same on every rank.

    Args:
        spike: a loss of so many times the running median is bad; none: only one that is not finite.
        recent: the last losses of the attempt before this one.
    """

    def __init__(self, spike: float | None, recent: Iterable[float] = ()) -> None:
        self._spike = spike
        self._recent = collections.deque(recent, maxlen=_WINDOW)

    def judge(self, loss: float) -> str:
        """What is wrong with a loss, in words; empty where nothing is, and then it counts for the next."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._spike is not None and len(self._recent) >= _ENOUGH:
            median = statistics.median(self._recent)
            if loss > self._spike * median > 0:
                return f"the loss is {loss:.4g}, {loss / median:.3g} times its running median"
        self._recent.append(loss)
        return ""

    @property
    def recent(self) -> list[float]:
        """The last good losses, to be saved."""
        return list(self._recent)
