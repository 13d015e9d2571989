"""A model over a dataset in evaluation mode: metrics and predictions, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from stoker import distributed, words
from stoker.data.loader import Collate, evaluation_batches
from stoker.engine import arguments, batches, modes
from stoker.engine.metrics import Metric, Totals
from stoker.engine.step import Setting, Step

Metrics = Callable[[Any, Any], Mapping[str, Metric]]
Outputs = Callable[[Any, Any], Any]

_TOGETHER = 32  # batches whose predictions the ranks exchange at once


@dataclass(frozen=True)
class Evaluation:
    """How a dataset goes through a model.

    Args:
        batch_size: samples per batch over all ranks.
        at_once: the most samples in a rank's batch; None: no limit.
        workers: processes that read samples.
        meanwhile: called after each batch.
    """

    step: Step
    setting: Setting
    batch_size: int
    at_once: int | None
    collate: Collate | None
    workers: int
    channels_last: bool
    meanwhile: Callable[[], None]

    @torch.no_grad()
    def measure(self, dataset: Any, metrics: Metrics) -> dict[str, float]:
        """Metrics over a dataset, with each sample counted once over all ranks; on every rank."""
        totals = Totals()
        with modes.evaluating(self.step.model):
            for output, batch, samples in self._each(dataset):
                if output is not None:
                    totals.add(self._answered(metrics, output, batch), samples > 0)
            return totals.over_ranks()

    @torch.no_grad()
    def predict(self, dataset: Any, outputs: Outputs) -> Any:
        """What `outputs` returns for all samples of a dataset, in its order; on every rank.

        Raises ValueError if it does not return one item per sample.
        """
        rank = self.setting.mesh.data.rank
        own: list[_Part] = []
        parts: list[_Part] = []
        with modes.evaluating(self.step.model):
            for output, batch, samples in self._each(dataset):
                own.append(self._part(outputs, output, batch, samples))
                if len(own) == _TOGETHER:
                    parts += _of_all_ranks(own, rank)
                    own = []
            parts += _of_all_ranks(own, rank)
        return _joined([part.found for part in parts])

    def _part(self, outputs: Outputs, output: Any, batch: Any, samples: int) -> _Part:
        if output is None:
            return _Part(counts=False, found=None)
        found = self._answered(outputs, output, batch)
        if samples:
            _check(found, samples)
        return _Part(samples > 0, batches.map_tensors(_copied, found))

    def _each(self, dataset: Any) -> Iterator[tuple[Any, Any, int]]:
        """Of each of this rank's batches the output, the batch on the device, and how many samples count.

        Ranks of a pipeline's earlier stages have no output.
        """
        shares = self.setting.mesh.data
        share = -(-self.batch_size // shares.size)
        size = min(share, self.at_once or share) * shares.size
        for batch, samples in evaluation_batches(dataset, size, shares, self.collate, self.workers):
            on_device = batches.to_device(batch, self.setting.mesh.device, channels_last=self.channels_last)
            yield self.step.forward(on_device), on_device, samples
            self.meanwhile()

    def _answered(self, answer: Callable[[Any, Any], Any], output: Any, batch: Any) -> Any:
        try:
            with self.setting.autocast():
                return answer(output, batch)
        except RuntimeError as error:
            arguments.explain_evaluated(error)
            raise


class _Part(NamedTuple):
    """What was found for a rank's share of a batch."""

    counts: bool
    found: Any


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, without the rest of what it is a view of."""
    return tensor.detach().cpu().clone()


def _check(found: Any, samples: int) -> None:
    """Raises ValueError if a value does not have one item per sample."""
    if isinstance(found, Mapping | tuple):
        for value in found.values() if isinstance(found, Mapping) else found:
            _check(value, samples)
        return
    shape = tuple(getattr(found, "shape", ()))
    rows = len(found) if isinstance(found, list) else shape[0] if shape else None
    if rows != samples:
        what = (
            f"a list of {rows}" if isinstance(found, list) else f"{type(found).__name__} {shape or found!r}"
        )
        raise ValueError(
            f"predict: for {samples} samples the function returned {what}: it must return tensors, arrays or "
            "lists with one item per sample, or dicts or tuples of these"
        )


def _of_all_ranks(own: list[_Part], rank: int) -> list[_Part]:
    """The parts that count, in the order of the dataset: the shares of a batch follow each other by rank."""
    by_rank = sorted(distributed.gathered((rank, own)), key=lambda held: held[0])
    of_batches = zip(*(parts for _, parts in by_rank), strict=True)
    return [part for parts in of_batches for part in parts if part.counts]


def _joined(parts: Sequence[Any]) -> Any:
    """The values of parts one after the other, in the structure that all of them have."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(column) for column in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, torch.Tensor) and len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    shapes = list(dict.fromkeys(str(tuple(part.shape)) for part in parts))
    raise ValueError(
        f"predict: what the function returned for batches has the shapes {words.some(shapes)}: pad it to one "
        "shape, or return a list with one item per sample"
    )
