"""A loss that tells of a broken step: not finite, or far above what it was of late."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from stoker import distributed
from stoker.tensors import local

MOST_IN_A_ROW = 10  # bad steps, of which all are left out
_WINDOW = 100  # steps whose median a spike is measured by
_ENOUGH = 10


class LossWatch:
    """Judges the losses of a run, one after the other, and remembers what came of bad ones.

    The same on every rank, and saved with checkpoints.

    Args:
        spike: a loss of so many times the running median is bad; None: only one that is not finite.
        at_once: look at every loss within its step. Else only before a checkpoint, since on a GPU to look
            at one is to wait for all that was computed.
    """

    def __init__(self, spike: float | None, *, at_once: bool = True) -> None:
        self._spike, self._at_once = spike, at_once
        self._recent: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._unseen: torch.Tensor | None = None
        self._in_a_row, self._bad_step = 0, -1
        self.rewound_to: set[int] = set()
        """The steps to whose checkpoints the run was put back."""

    def see(self, loss: torch.Tensor) -> str:
        """What is wrong with a step's loss, a scalar, in words; empty where nothing is, or nobody looks."""
        if not self._at_once:
            self._unseen = loss.detach()
            return ""
        return self.judge(loss.item())

    def look(self) -> str:
        """What is wrong with the newest loss, where `see` did not look at it."""
        unseen, self._unseen = self._unseen, None
        return "" if unseen is None else self.judge(unseen.item())

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

    def count(self, step: int) -> bool:
        """Count a bad step; whether there were so many in a row that it is not the batches.

        A step of a loop of one's own may have several bad gradients, which count once.
        """
        if step != self._bad_step:
            self._in_a_row = self._in_a_row + 1 if step - self._bad_step == 1 else 1
            self._bad_step = step
        return self._in_a_row > MOST_IN_A_ROW

    def rewind(self, step: int, saved: Mapping[str, Any]) -> None:
        """The run is put back to the checkpoint of a step, whose `state` was this."""
        self.rewound_to.add(step)
        self._remember(saved)

    def state(self) -> dict[str, Any]:
        """What is saved: the last good losses, and what came of bad ones."""
        return {
            "losses": list(self._recent),
            "bad": [self._in_a_row, self._bad_step],
            "rewound_to": sorted(self.rewound_to),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` was. Checkpoints of old have no more than the losses."""
        self._remember(saved)
        self._in_a_row, self._bad_step = saved.get("bad", (0, -1))
        self.rewound_to = set(saved.get("rewound_to", ()))

    def _remember(self, saved: Mapping[str, Any]) -> None:
        self._recent = collections.deque(saved["losses"], maxlen=_WINDOW)
        self._unseen = None


def explained(step: int, wrong: str, weights: Mapping[str, torch.Tensor], *, too_many: bool) -> str:
    """Why a run ends with a bad step that has changed no weight, and what to do. All ranks call it.

    Args:
        too_many: it was one of so many in a row that it is not the batches.
    """
    # A gradient that nobody looked at may have spoilt them before, which the next loss shows.
    finite = all(bool(tensor.isfinite().all()) for tensor in map(local, weights.values()))
    now = "the weights are those from before this step"
    if not all(distributed.gathered(finite)):
        now = "the weights are not finite since an earlier bad gradient, but the newest checkpoint is"
    if too_many:
        return (
            f"step {step}: {wrong}, as in the {MOST_IN_A_ROW} steps before, so the batches are not the "
            f"cause; {now}. Resume from the newest checkpoint with a different learning rate"
        )
    return (
        f"step {step}: {wrong}; {now}. Resume with on_bad_loss=skip or rewind, or change what caused it "
        "(the learning rate, the data)"
    )
