"""What the ranks of a run tell each other at every step, in one small reduction.

The sum of the loss and its weight, so that the mean is over the whole global batch; and whether
a rank was asked to stop or finds a checkpoint due, so that all of them do the same thing after
the same step. It is started before the last backward pass and waited for after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from stoker.world import World

Weight = torch.Tensor | float


@dataclass(frozen=True)
class Requests:
    """What was asked for, by the clock or by signals, on any rank."""

    preempted: bool = False
    interrupted: bool = False
    checkpoint: bool = False

    @property
    def stop(self) -> str | None:
        """The status of a run that stops now, if it does."""
        return "interrupted" if self.interrupted else "preempted" if self.preempted else None


class Agreement:
    """Adds up loss, weight and requests over all ranks.

    Args:
        world: the ranks.
        device: where the loss is.
        ask: what this rank was asked for until now.
    """

    def __init__(self, world: World, device: torch.device, ask: Callable[[], Requests]) -> None:
        self._world, self._device, self._ask = world, device, ask
        self._sums: torch.Tensor | None = None
        self._work: Any = None
        self._held: tuple[torch.Tensor, Weight] | None = None

    def start(self, loss_sum: torch.Tensor, weight: Weight) -> None:
        """Begin to add up; every rank calls it once a step."""
        if self._world.size == 1:
            self._held = (loss_sum, weight)
            return
        asked = self._ask()
        parts = [loss_sum, weight, asked.preempted, asked.interrupted, asked.checkpoint]
        self._sums = torch.stack([self._scalar(part) for part in parts])
        self._work = dist.all_reduce(self._sums, async_op=True)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the weight over all ranks, scalars on the device; a float32 loss."""
        if self._world.size == 1:
            assert self._held is not None
            loss_sum, weight = self._held
            return loss_sum, weight if isinstance(weight, torch.Tensor) else self._scalar(weight).float()
        self._work.wait()
        assert self._sums is not None
        return self._sums[0].float(), self._sums[1].float()

    def requests(self) -> Requests:
        """What all ranks do after this step, the same on each.

        Reads the reduced values: on a GPU that waits for the reduction, which the optimizer's step
        has waited for too.
        """
        if self._world.size == 1:
            return self._ask()
        if self._sums is None:  # a step without an update
            self.start(torch.zeros((), device=self._device), 0.0)
            self._work.wait()
        assert self._sums is not None
        preempted, interrupted, checkpoint = (self._sums[2:] > 0).tolist()
        self._sums = None
        return Requests(preempted, interrupted, checkpoint)

    def _scalar(self, value: Weight) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self._device, torch.float64)
        return torch.full((), float(value), dtype=torch.float64, device=self._device)
