"""Detects losses that indicate a broken step: not finite, or far above the recent ones."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from stoker import distributed
from stoker.tensors import local

MOST_IN_A_ROW = 10  # bad steps, all of which are skipped
_WINDOW = 100  # steps over which the median for spikes is taken
_ENOUGH = 10


class LossWatch:
    """Judges the losses of a run one by one, and remembers how bad ones were handled.

    Its state is the same on every rank, and saved with checkpoints.

    Args:
        spike: a loss this many times the running median is bad; None: only non-finite losses are.
        at_once: check every loss within its step. If false, check only before a checkpoint, since on a GPU
            reading a loss waits for everything computed so far.
    """

    def __init__(self, spike: float | None, *, at_once: bool = True) -> None:
        self._spike, self._at_once = spike, at_once
        self._recent: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._unseen: torch.Tensor | None = None
        self._in_a_row, self._bad_step = 0, -1
        self.rewound_to: set[int] = set()
        """The steps to whose checkpoints the run was rewound."""

    def see(self, loss: torch.Tensor) -> str:
        """What is wrong with a step's scalar loss, as text; empty if nothing is, or it is not checked now."""
        if not self._at_once:
            self._unseen = loss.detach()
            return ""
        return self.judge(loss.item())

    def look(self) -> str:
        """What is wrong with the newest loss, if `see` did not check it."""
        unseen, self._unseen = self._unseen, None
        return "" if unseen is None else self.judge(unseen.item())

    def judge(self, loss: float) -> str:
        """What is wrong with a loss, as text; empty if nothing is, and then it counts towards the median."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._spike is not None and len(self._recent) >= _ENOUGH:
            median = statistics.median(self._recent)
            if loss > self._spike * median > 0:
                return f"the loss is {loss:.4g}, {loss / median:.3g} times its running median"
        self._recent.append(loss)
        return ""

    def count(self, step: int) -> bool:
        """Count a bad step; returns whether there were too many in a row for the batches to be the cause.

        A step of a user's own loop can have several bad gradients, which count once.
        """
        if step != self._bad_step:
            self._in_a_row = self._in_a_row + 1 if step - self._bad_step == 1 else 1
            self._bad_step = step
        return self._in_a_row > MOST_IN_A_ROW

    def rewind(self, step: int, saved: Mapping[str, Any]) -> None:
        """Rewind to the checkpoint of a step, which was saved with this `state`."""
        self.rewound_to.add(step)
        self._remember(saved)

    def state(self) -> dict[str, Any]:
        """What is saved: the last good losses, and how bad ones were handled."""
        return {
            "losses": list(self._recent),
            "bad": [self._in_a_row, self._bad_step],
            "rewound_to": sorted(self.rewound_to),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Old checkpoints contain only the losses."""
        self._remember(saved)
        self._in_a_row, self._bad_step = saved.get("bad", (0, -1))
        self.rewound_to = set(saved.get("rewound_to", ()))

    def _remember(self, saved: Mapping[str, Any]) -> None:
        self._recent = collections.deque(saved["losses"], maxlen=_WINDOW)
        self._unseen = None


def explained(step: int, wrong: str, weights: Mapping[str, torch.Tensor], *, too_many: bool) -> str:
    """Why a run ends with a bad step that changed no weights, and what to do. All ranks call it.

    Args:
        too_many: it followed so many bad steps that the batches are not the cause.
    """
    # A gradient that was not checked may have corrupted the weights earlier; the next loss then shows it.
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
