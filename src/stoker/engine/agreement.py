"""What the ranks of a run tell each other at every step, in one small reduction.

They share the sum of the loss and its weight, so that the mean is over the whole global batch; and
whether any rank was asked to stop or has a checkpoint due, so that all ranks do the same thing after
the same step. The reduction starts before the last backward pass and is waited for after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from stoker.status import INTERRUPTED, PAUSED, PREEMPTED, STOPPED
from stoker.world import World

Weight = torch.Tensor | float

_STOPS = (INTERRUPTED, PREEMPTED, STOPPED, PAUSED)  # the first one that any rank was asked for wins


@dataclass(frozen=True)
class Requests:
    """What was requested on any rank, by time, signals or a search."""

    interrupted: bool = False
    preempted: bool = False
    stopped: bool = False
    """End early, for good."""
    paused: bool = False
    checkpoint: bool = False
    failed: bool = False
    """A checkpoint could not be written."""

    @property
    def stop(self) -> str | None:
        """The status of a run that stops now; None if it continues."""
        return next((status for status in _STOPS if getattr(self, status)), None)

    @property
    def save(self) -> bool:
        """Whether to save a checkpoint: a run that stops for good needs none."""
        return self.checkpoint or self.stop not in (None, STOPPED)


class Agreement:
    """Sums loss, weight and requests over all ranks.

    Requests travel in a CPU tensor, so that on GPUs no rank waits for the device to read them.

    Args:
        world: the ranks.
        device: the device of the loss.
        ask: returns what this rank has been asked for until now.
    """

    def __init__(self, world: World, device: torch.device, ask: Callable[[], Requests]) -> None:
        self._alone = world.size == 1 or world.planned > 0  # a plan's imaginary ranks request nothing
        self._device, self._ask = device, ask
        self._loss: torch.Tensor | None = None
        self._asked: torch.Tensor | None = None
        self._work: list[Any] = []
        self._held: tuple[torch.Tensor, Weight] | None = None

    def start(self, loss_sum: torch.Tensor, weight: Weight) -> None:
        """Start the reduction; every rank calls it once per update (a step can have several updates)."""
        if self._alone:
            self._held = (loss_sum, weight)
            return
        flags = torch.tensor(astuple(self._ask()), dtype=torch.float64, device="cpu")
        if self._asked is not None:  # from an earlier update in this step
            flags += self._over_ranks()
        sums = torch.stack([self._scalar(loss_sum), self._scalar(weight)])
        if self._device.type == "cpu":  # one reduction for both
            both = torch.cat([sums, flags])
            self._work = [dist.all_reduce(both, async_op=True)]
            self._loss, self._asked = both[:2], both[2:]
        else:
            self._work = [dist.all_reduce(sums, async_op=True), dist.all_reduce(flags, async_op=True)]
            self._loss, self._asked = sums, flags

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the weight over all ranks, as scalars on the device; the loss is float32."""
        if self._alone:
            assert self._held is not None
            loss_sum, weight = self._held
            return loss_sum, weight if isinstance(weight, torch.Tensor) else self._scalar(weight).float()
        self._work[0].wait()
        assert self._loss is not None
        return self._loss[0].float(), self._loss[1].float()

    def requests(self) -> Requests:
        """What all ranks do after this step; the same on every rank."""
        if self._alone:
            return self._ask()
        if self._asked is None:  # a step without an update
            self.start(torch.zeros((), device=self._device), 0.0)
        asked = (self._over_ranks() > 0).tolist()
        self._asked = None
        return Requests(*asked)

    def _over_ranks(self) -> torch.Tensor:
        """For each request, the number of ranks that were asked for it."""
        for work in self._work:
            work.wait()
        assert self._asked is not None
        return self._asked

    def _scalar(self, value: Weight) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self._device, torch.float64)
        return torch.full((), float(value), dtype=torch.float64, device=self._device)
