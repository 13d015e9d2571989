"""Metrics over a dataset that is divided among ranks: exact, however it is divided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from stoker.run.reduction import reduced

Number = torch.Tensor | float


@dataclass(frozen=True)
class Mean:
    """A sum and its divisor, both summed over batches and ranks before dividing."""

    total: Number
    weight: Number


@dataclass(frozen=True)
class Perplexity:
    """exp of a mean: the summed negative log-likelihood in nats, and the number of tokens."""

    total: Number
    weight: Number


@dataclass(frozen=True)
class Sum:
    """A sum over batches and ranks."""

    total: Number


@dataclass(frozen=True)
class Max:
    """The largest value over batches and ranks; NaN if any value is NaN."""

    value: Number


Metric = Mean | Perplexity | Sum | Max


class Totals:
    """Sums up metrics in float64, on the device that they are on: a GPU is waited for once, at the end."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[type[Any], Number, Number]] = {}

    def add(self, metrics: Mapping[str, Metric], counts: bool = True) -> None:
        """Add the metrics of a batch; with `counts=False` only their names are recorded."""
        for name, metric in metrics.items():
            kind = type(metric)
            _, total, weight = self._held.get(name, (kind, -math.inf if kind is Max else 0.0, 0.0))
            if counts and isinstance(metric, Max):
                total = _larger(total, _in_float64(metric.value))
            elif counts and not isinstance(metric, Max):
                total = total + _in_float64(metric.total)
                weight = weight if isinstance(metric, Sum) else weight + _in_float64(metric.weight)
            self._held[name] = (kind, total, weight)

    def over_ranks(self) -> dict[str, float]:
        """The metrics over all ranks, on every rank; ranks without any metrics take part too."""
        own = {n: (k.__name__, float(total), float(weight)) for n, (k, total, weight) in self._held.items()}
        rows = [own]
        if dist.is_initialized():
            rows = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(rows, own)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: _joined([row[name] for row in rows if name in row]) for name in names}


def _in_float64(value: Number) -> Number:
    return value.detach().double() if isinstance(value, torch.Tensor) else float(value)


def _larger(one: Number, other: Number) -> Number:
    """The larger of two numbers, NaN if one of them is."""
    return torch.maximum(*(torch.as_tensor(number, dtype=torch.float64) for number in (one, other)))


def _joined(parts: list[tuple[str, float, float]]) -> float:
    """One metric combined over all ranks, always in rank order."""
    kind = parts[0][0]
    if kind == "Max":
        return reduced("max", [total for _, total, _ in parts])
    total = reduced("sum", [total for _, total, _ in parts])
    if kind == "Sum":
        return total
    weight = reduced("sum", [weight for _, _, weight in parts])
    mean = total / weight if weight else math.nan
    if kind == "Perplexity":
        return perplexity(mean)
    return mean


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss in nats per token; infinite if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
