"""What would fit after running out of memory: tried in a single process, otherwise estimated from the error.

Changes are considered in the order of their cost: smaller micro-batches, recomputing activations, more
ranks. None of them changes the results of a run, except for BatchNorm's statistics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from stoker import words
from stoker.engine import (
    activation,
    batches,
    blocks,
    gradients,
    memory,
    micro_batch,
    out_of_memory,
    rehearsal,
)
from stoker.engine.settings import Training
from stoker.engine.step import PlainStep, Setting, Step
from stoker.errors import BadInput

log = logging.getLogger("stoker")

_ROOM = 0.8  # of a rank's memory for weights, gradients and optimizer state; the rest is for activations


class Change:
    """The cheapest change with which a training that ran out of memory would fit.

    Args:
        strategy: the chosen one, never `auto`.
        block: bytes of the largest repeated block, unsharded; 0 if the model has none.
    """

    def __init__(self, step: Step, setting: Setting, training: Training, strategy: str, block: int) -> None:
        self._step, self._setting, self._training = step, setting, training
        self._strategy, self._block = strategy, block

    def of_a_pass(
        self, error: torch.OutOfMemoryError, batch: Any, sizes: Sequence[int], micro: int | None
    ) -> str:
        """Advice after a forward or backward pass ran out of memory, as text. Discards the gradients.

        Args:
            batch: this rank's share of a global batch, where the loader left it.
            sizes: possible sizes of a micro-batch, smallest first.
            micro: samples of the micro-batch that did not fit; None: the whole share.
        """
        if self._training.optimizer_in_backward:  # it excludes micro-batches, and trying would change weights
            return self._recomputing() or self.of_an_update()
        smaller = [size for size in sizes if size < (micro or batches.size(batch))]
        reckoned = self._reckoned(error, smaller, micro or batches.size(batch))
        several = self._setting.mesh.world.size > 1
        if several or self._setting.loss is None or not isinstance(self._step, PlainStep):
            return reckoned  # the other ranks would have to try too, but they wait for the step that failed
        log.warning("trying which micro-batch would fit")
        _let_go(error)
        self._step.clear()
        try:
            return self._tried(batch, smaller, micro)
        except Exception as why:  # an error of the model itself
            log.debug("trying smaller micro-batches failed: %r", why)
            return reckoned

    def of_an_update(self) -> str:
        """Advice if there are no activations to reduce."""
        if self._strategy not in ("single", "ddp"):
            return self._advice("more ranks, or the strategy's offload")
        training = dataclasses.replace(self._training, optimizer_in_backward=False)
        ranks = memory.ranks_that_hold(
            self._step.model, self._blocks(), training, _ROOM * self._has(), self._moments()
        )
        without = "optimizer_in_backward=false and " if self._training.optimizer_in_backward else ""
        return self._advice(f"{without}parallel=fsdp over {f'{ranks} such' if ranks else 'more'} ranks")

    def _tried(self, batch: Any, smaller: Sequence[int], micro: int | None) -> str:
        """The change with which a pass was seen to fit."""
        found = self._largest(batch, smaller)
        if found is not None:
            return self._advice(f"micro_batch={found}, which was tried and fits")
        recomputing = self._recomputing(micro)
        if recomputing:
            with contextlib.suppress(BadInput):
                activation.apply(self._blocks(), "full")
                if self._largest(batch, [1]) is not None:
                    return recomputing.replace("=full", "=full, which was tried and fits")
        return self._of_one_sample()

    def _recomputing(self, micro: int | None = 1) -> str:
        """Advice to recompute activations; empty if they are, or if the model has no blocks."""
        if self._training.activation_checkpointing == "full" or not self._block:
            return ""
        return self._advice(f"{'' if micro == 1 else 'micro_batch=1 '}activation_checkpointing=full")

    def _of_one_sample(self) -> str:
        """Advice if the activations of a single sample do not fit next to the state."""
        whole = memory.needed(self._step.model, (), "ddp", self._training, 1, self._moments()).total
        if self._strategy not in ("single", "ddp") or whole > (1 - _ROOM) * self._has():
            return self.of_an_update()
        return (
            f"Weights, gradients and optimizer state take only {words.size(whole)} of "
            f"{words.size(self._has())}, so sharding them would free little memory. Use smaller samples, or "
            "parallel=pipeline over several ranks, each of which holds some of the layers"
        )

    def _has(self) -> int:
        return memory.of_a_rank(self._setting.mesh.device, self._setting.mesh.world)

    def _moments(self) -> float:
        """Bytes that the optimizers keep per weight."""
        try:
            optimizers = self._step.optimizers.values()
            return max(kept for o in optimizers for _, kept in rehearsal.kept_for_each(o))
        except Exception:  # for example, of an optimizer that wraps another
            return memory.MOMENTS

    def _blocks(self) -> list[tuple[str, torch.nn.Module]]:
        """The blocks as the strategy left them, possibly with different names."""
        try:
            return blocks.find(self._step.model, self._training.blocks)
        except BadInput:
            return []

    def _largest(self, batch: Any, sizes: Sequence[int]) -> int | None:
        """The largest micro-batch that fits next to the state that optimizers will create."""

        def attempt(size: int) -> None:
            moved = batches.to_device(
                batch, self._setting.mesh.device, channels_last=self._training.channels_last
            )
            rehearsal.rehearse(self._step, self._setting, moved, size)

        try:
            with out_of_memory.as_on_a_gpu():
                held = [rehearsal.state_to_come(o) for o in self._step.optimizers.values()]
        except torch.OutOfMemoryError:
            return None
        found = micro_batch.largest(sizes, attempt, self._setting.mesh.device)
        del held
        return found

    def _reckoned(self, error: torch.OutOfMemoryError, smaller: Sequence[int], micro: int) -> str:
        """Estimate from what was held, requested and free, which gives a lower bound for activations."""
        asked, free, held = out_of_memory.numbers(error, self._setting.mesh.device)
        now, all_of_it = self._state()
        activations, room = held + asked - now, held + free - all_of_it
        if room <= 0:
            return self.of_an_update()
        fitting = [size for size in smaller if activations * size <= room * micro]
        if fitting:
            auto = "" if self._training.micro_batch == "auto" else " (auto finds the largest that fits)"
            return self._advice(f"micro_batch={fitting[-1]} or less{auto}")
        return self._recomputing(micro) or self._of_one_sample()

    def _state(self) -> tuple[float, float]:
        """Bytes that smaller micro-batches do not reduce: those held now, and including those to come."""
        of = memory.by_kind(self._step, self._setting.mesh.device, self._training)
        gathered = self._block if self._strategy == "fsdp" else 0
        now = (
            of["weights"]
            + memory.held(gradients.of(self._step.model.parameters()))
            + of["optimizer"]
            + gathered
        )
        to_come = of["optimizer"] or self._moments() / 4 * of["gradients"]
        return now, of["weights"] + of["gradients"] + to_come + gathered

    def _advice(self, change: str) -> str:
        changes = blocks.has_batch_norm(self._step.model)
        return f"Use {change}" + ("" if changes else ": the result stays the same")


def _let_go(error: BaseException | None) -> None:
    """Free the activations that the frames of a failed pass still hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
