"""Splitting a rank's share of a global batch into micro-batches, and the message if none fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from stoker import distributed
from stoker.engine import batches, blocks, fitting, micro_batch, options, out_of_memory, rehearsal
from stoker.engine.settings import Training, of_memory
from stoker.engine.step import Setting, Step
from stoker.words import counted

log = logging.getLogger("stoker")


class MicroBatches:
    """The micro-batches of a training: of a given size, of a size found by trying, or the whole share.

    Args:
        strategy: the chosen one, never `auto`.
        block: bytes of the model's largest repeated block, unsharded; 0 if it has none.
    """

    def __init__(self, step: Step, setting: Setting, training: Training, strategy: str, block: int) -> None:
        self._step, self._setting, self._training = step, setting, training
        self._strategy, self._block = strategy, block
        self.size = training.micro_batch
        """Samples per micro-batch; `auto` before the first batch; None: a rank's whole share."""
        self.share: int | None = None
        """Samples that the loader puts into a rank's share, once known."""

    @property
    def at_once(self) -> int | None:
        """The most samples that a rank computes at once; 1 before `auto` has found it; None: any number."""
        return 1 if self.size == "auto" else self.size

    def of(self, batch: Any) -> Iterator[Any]:
        """The batch on the device, split. Raises BadInput if it cannot be split, see `batches.split`."""
        if self.size == "auto":
            self.size = self._found(batch)
            log.info(
                "micro_batch=%d of a rank's share of %s", self.size, counted(self._samples(batch), "sample")
            )
        if self.size is None and self._strategy == "pipeline":
            share, sizes = self._samples(batch), self._sizes(batch)
            self.size = micro_batch.of_pipeline(sizes, share, self._setting.mesh.size("stage"))
        return batches.split(batch, self.size, self.share)

    def _found(self, batch: Any) -> int:
        """The largest size that fits, or the whole batch if it cannot be split. All ranks call it."""
        if not all(distributed.gathered(batches.can_be_cut(batch, self.share))):
            return self._samples(batch)
        return rehearsal.largest_micro_batch(
            self._step, self._setting, batch, self._sizes(batch), self._about()
        )

    def take_smaller(self, batch: Any) -> bool:
        """Halve an automatic size, and remember it; False if that is not possible."""
        if self._training.micro_batch != "auto" or not isinstance(self.size, int):
            return False
        smaller = [size for size in self._sizes(batch) if size <= int(self.size) // 2]
        if not smaller:
            return False
        self.size = smaller[-1]
        rehearsal.remember(self._step, self._setting, batch, self.size, self._about())
        return True

    def out_of_memory(self, error: torch.OutOfMemoryError, batch: Any = None) -> str:
        """What was requested, what was free, and the cheapest change that would fit.

        Args:
            batch: this rank's share, if its forward and backward pass ran out of memory; None: the update
                did.
        """
        said = out_of_memory.said(error, self._setting.mesh.world.rank)
        log.warning("%s", said)  # trying what would fit can end the process
        change = fitting.Change(self._step, self._setting, self._training, self._strategy, self._block)
        if batch is None or self.size == "auto":  # `auto` already tries with optimizer state
            return f"{said} {change.of_an_update()}"
        micro = self.size if isinstance(self.size, int) else self._samples(batch)
        return f"{said} {change.of_a_pass(error, batch, self._sizes(batch), micro)}"

    def _sizes(self, batch: Any) -> list[int]:
        """The sizes that a micro-batch can have; BatchNorm has no statistics of a single sample."""
        schedule = self._training.pipeline.schedule if self._strategy == "pipeline" else "gpipe"
        ranks, samples = self._setting.mesh.size("stage"), self._samples(batch)
        if ranks == 1 and not batches.can_be_cut(batch, self.share):
            return [samples]
        sizes = options.pipeline_micro_batches(schedule, samples, ranks)
        normed = blocks.has_batch_norm(self._step.model)
        return [size for size in sizes if size > 1] or sizes if normed else sizes

    def _samples(self, batch: Any) -> int:
        return batches.size(batch, self.share)

    def _about(self) -> dict[str, Any]:
        return {"strategy": self._strategy, **of_memory(self._training)}
