"""Guard: what becomes of a step whose loss or gradient is bad, as `on_bad_loss` says.

A bad step has changed no weights. The run ends with it, or its samples are left out: the buffers are put
back as they were before the step, or the weights are those of a checkpoint again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from stoker import distributed
from stoker.attempt import Attempt
from stoker.engine import bad_loss
from stoker.engine.buffers import Buffers
from stoker.engine.position import Position
from stoker.engine.settings import Training
from stoker.engine.step import Step
from stoker.engine.trained import Trained
from stoker.errors import StokerError
from stoker.saving import Checkpoints
from stoker.supervision import Heart

log = logging.getLogger("stoker")


class Guard:
    """Judges the steps of a run, and answers the bad ones.

    Args:
        at_once: judge every loss within its step, even if the settings do not need it; see `LossWatch`.
        heart: beats while a checkpoint is waited for.
    """

    def __init__(
        self,
        attempt: Attempt,
        step: Step,
        checkpoints: Checkpoints,
        training: Training,
        heart: Heart,
        *,
        at_once: bool,
    ) -> None:
        self._attempt, self._step, self._checkpoints, self._heart = attempt, step, checkpoints, heart
        self._how = training.on_bad_loss
        self._undoes = self._how == "skip" or training.micro_batch == "auto"
        asks = self._how != "stop" or training.spike is not None
        several = len(step.optimizers) > 1  # and as many losses, which have no median in common
        self._losses = bad_loss.LossWatch(None if several else training.spike, at_once=asks or at_once)
        self._buffers = Buffers(step.model)
        self._trained = Trained(step.model)
        self._trained.changed()
        self._since = 0  # the step from which on checkpoints have what is trained now

    def see(self, loss: torch.Tensor) -> str:
        """What is wrong with a step's scalar loss, as text; empty if nothing is, or it is not checked now."""
        return self._losses.see(loss)

    def look(self) -> str:
        """What is wrong with the newest loss, if `see` did not check it."""
        return self._losses.look()

    def state(self) -> dict[str, Any]:
        """What is saved: the last good losses, and how bad ones were handled."""
        return self._losses.state()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._losses.restore(saved)

    def keep_buffers(self) -> None:
        """Copy the buffers as they are between updates, if a pass may turn out not to count."""
        if self._undoes:
            self._buffers.keep()

    def put_buffers_back(self) -> None:
        """A pass does not count: the buffers are as they were before it."""
        self._buffers.put_back()

    def needs_a_checkpoint(self, step: int) -> bool:
        """Whether none from before a step has what this rank trains now: none could be rewound to."""
        if self._how != "rewind" or not self._trained.changed():
            return False
        self._since = step
        return True

    def answer(self, wrong: str, at: Position, samples: int) -> None:
        """Do what `on_bad_loss` says of the step at a position. All ranks call it.

        Args:
            wrong: what is wrong with it.
            samples: how many it has.

        Raises:
            StokerError: the run ends with this step.
        """
        step, is_first_rank = at.step + 1, self._attempt.world.rank == 0
        too_many = self._losses.count(step)
        if self._how == "stop" or too_many:
            raise StokerError(bad_loss.explained(step, wrong, self._step.weights(), too_many=too_many))
        first, last = at.samples, at.samples + samples - 1
        self._attempt.event("skipped", step=step, samples=[first, last], reason=wrong)
        if is_first_rank:
            log.warning("step %d: %s; samples %d to %d are left out", step, wrong, first, last)
        if self._how == "skip":
            self._buffers.put_back()
            return
        to = self._rewind(step)
        self._attempt.event("rewound", step=step, to=to)
        if is_first_rank:
            log.warning("rewound the weights to those of step %d", to)

    def _rewind(self, step: int) -> int:
        """Restore the weights and optimizer state of the newest checkpoint, and return its step.

        The data continues. Each checkpoint is used once: one that has led to a bad loss before is passed over
        for an older one.
        """
        self._checkpoints.wait(meanwhile=self._heart.beat)
        self.needs_a_checkpoint(step)
        since = max(distributed.gathered(self._since))  # of a pipeline's stages one may have changed
        found, _ = self._checkpoints.newest(but=self._losses.rewound_to)
        if found is None:
            raise StokerError(f"step {step}: there is no checkpoint left to rewind to; all were tried")
        if found.step < since:
            raise StokerError(
                f"step {step}: there is no checkpoint left to rewind to: those before step {since} are of a "
                "model of which other weights are trained"
            )
        self._losses.rewind(found.step, self._checkpoints.restore(found).position)
        return found.step
