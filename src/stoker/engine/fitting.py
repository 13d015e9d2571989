"""What would fit where memory ran out: tried where a rank can do so alone, else reckoned from what was asked.

Changes are weighed in the order of what they cost: smaller micro-batches, activations computed
again, more ranks. None of them changes what a run computes but BatchNorm's statistics.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from stoker.engine import activation, batches, blocks, memory, micro_batch, out_of_memory, rehearsal
from stoker.engine.options import Training
from stoker.engine.step import Setting, Step
from stoker.errors import BadInput
from torch.nn.modules.batchnorm import _BatchNorm

_ROOM = 0.8  # of a rank's memory for weights, gradients and optimizer state; the rest is activations


class Change:
    """The cheapest change with which a training that ran out of memory would fit.

    Args:
        strategy: as it was chosen, never `auto`.
    """

    def __init__(self, step: Step, setting: Setting, training: Training, strategy: str) -> None:
        self._step, self._setting, self._training, self._strategy = step, setting, training, strategy
        try:
            self._blocks = blocks.find(step.model, training.blocks)
        except BadInput:  # a stage of a pipeline may have none of those that were named
            self._blocks = []

    def of_a_pass(
        self, error: torch.OutOfMemoryError, batch: Any, sizes: Sequence[int], micro: int | None
    ) -> str:
        """After a forward or backward pass; in words that begin with `Give`. Forgets the gradients.

        Args:
            batch: this rank's share of a global batch, where the loader left it.
            sizes: what a micro-batch may have, smallest first.
            micro: samples of the one that did not fit; None: the whole share.
        """
        smaller = [size for size in sizes if size < (micro or batches.size(batch))]
        if not rehearsal.works_alone(self._step, self._setting, self._strategy):
            return self._reckoned(error, smaller, micro or batches.size(batch))
        _let_go(error)
        self._step.clear()
        found = self._largest(batch, smaller)
        if found is not None:
            return self._said(f"micro_batch={found}, which was tried and fits")
        if self._recomputes() and self._largest(batch, [1]) is not None:
            one = "" if micro == 1 else "micro_batch=1 "
            return self._said(f"{one}activation_checkpointing=full, which was tried and fits")
        return self._of_one_sample()

    def of_an_update(self) -> str:
        """Where no activations are left that could be fewer."""
        if self._strategy not in ("single", "ddp"):
            return self._said("more ranks, or the strategy's offload")
        room = _ROOM * self._has()
        ranks = memory.ranks_that_hold(self._step.model, self._blocks, self._training, room)
        return self._said(f"parallel=fsdp over {f'{ranks} such' if ranks else 'more'} ranks")

    def _of_one_sample(self) -> str:
        """Where the activations of one sample are too many beside the state."""
        whole = memory.needed(self._step.model, self._blocks, "ddp", self._training, 1).total
        if self._strategy not in ("single", "ddp") or whole > (1 - _ROOM) * self._has():
            return self.of_an_update()
        return (
            f"Weights, gradients and optimizer state are {memory.size(whole)} of {memory.size(self._has())}: "
            "to shard them makes little room. Give smaller samples, or parallel=pipeline over "
            "several ranks, each of which has some of the layers"
        )

    def _has(self) -> int:
        mesh = self._setting.mesh
        return memory.of_a_rank(mesh.device, mesh.world.local_size)

    def _largest(self, batch: Any, sizes: Sequence[int]) -> int | None:
        """The largest micro-batch that fits beside the gradients, and the state optimizers will make."""

        def attempt(size: int) -> None:
            part = next(batches.split(batch, size))
            moved = batches.to_device(
                part, self._setting.mesh.device, channels_last=self._training.channels_last
            )
            rehearsal.alone(self._step, self._setting, moved)

        try:
            with out_of_memory.as_on_a_gpu():
                held = [rehearsal.state_to_come(o) for o in self._step.optimizers.values()]
        except torch.OutOfMemoryError:
            return None
        found = micro_batch.largest(sizes, attempt, self._setting.mesh.device, alone=True)
        del held
        return found

    def _recomputes(self) -> bool:
        """Have blocks compute their activations again from now on; whether they did not before."""
        if self._training.activation_checkpointing == "full":
            return False
        try:
            activation.apply(self._blocks, "full")
        except BadInput:
            return False
        return True

    def _reckoned(self, error: torch.OutOfMemoryError, smaller: Sequence[int], micro: int) -> str:
        """From what was held, asked for and free, which says how much is needed at least."""
        asked, free, held = out_of_memory.numbers(error, self._setting.mesh.device)
        stays = self._stays()
        needed, room = held + asked - stays, held + free - stays
        fitting = [size for size in smaller if needed * size <= room * micro]
        if fitting:
            return self._said(f"micro_batch={fitting[-1]} or less (auto finds the largest that fits)")
        if self._training.activation_checkpointing != "full" and self._blocks:
            one = "" if micro == 1 else "micro_batch=1 "
            return self._said(f"{one}activation_checkpointing=full")
        return self._of_one_sample()

    def _stays(self) -> float:
        """Bytes that smaller micro-batches do not make less."""
        of = memory.by_kind(self._step, self._setting.mesh.device, self._training)
        state = of["optimizer"] or memory.MOMENTS / 4 * of["gradients"]
        gathered = max((sum(p.nbytes for p in b.parameters()) for _, b in self._blocks), default=0)
        return of["weights"] + of["gradients"] + state + (gathered if self._strategy == "fsdp" else 0)

    def _said(self, change: str) -> str:
        statistics = any(isinstance(m, _BatchNorm) for m in self._step.model.modules())
        return f"Give {change}" + ("" if statistics else ": the result stays the same")


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of a pass that failed still hold: its activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
