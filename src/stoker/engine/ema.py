"""A moving average of the weights (Polyak & Juditsky 1992), kept next to them shard by shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from stoker.engine import settings
from stoker.engine.precision import wide
from stoker.engine.step import Step
from stoker.engine.trained import Trained
from stoker.tensors import local


class Ema:
    """The average of the trained weights, in float32 or wider, each on the same rank as its weight's shard.

    A weight that is unfrozen later is averaged from then on, also while it is frozen again.
    """

    def __init__(self, step: Step, asked: settings.Ema) -> None:
        assert asked.decay is not None
        self._decay, self._warmup = asked.decay, asked.warmup
        self._step, self._trained = step, Trained(step.model)
        self._weights: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        """By name; saved with a checkpoint."""
        self.include()

    def include(self) -> None:
        """Begin the averages of weights that were unfrozen, with their values before they are trained."""
        if self._trained.changed():
            self._begin(self._step.weights())

    def _begin(self, weights: Mapping[str, torch.Tensor]) -> None:
        new = {n: w for n, w in weights.items() if n not in self._weights}
        self._weights.update(new)
        self.values.update({n: w.detach().clone().to(wide(w.dtype)) for n, w in new.items()})

    def take(self) -> None:
        """Set the average to the current weights."""
        self.restore({n: w.detach() for n, w in self._weights.items()})

    @torch.no_grad()
    def restore(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore saved values; an average without one starts from the current weight."""
        self._begin({n: p for n, p in self._step.model.named_parameters() if n in values})
        for name, weight in self._weights.items():
            local(self.values[name]).copy_(local(values.get(name, weight)))

    @torch.no_grad()
    def update(self, step: int, moved: Iterable[torch.Tensor] | None = None) -> None:
        """Move the average towards the weights after optimizer step `step`, counted from 0.

        Args:
            moved: the weights that this step changed, if not all of them.
        """
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
        only = None if moved is None else {id(w) for w in moved}
        names = [n for n, w in self._weights.items() if only is None or id(w) in only]
        torch._foreach_lerp_(
            [local(self.values[n]) for n in names],
            [local(self._weights[n].detach()).to(wide(self._weights[n].dtype)) for n in names],
            1.0 - decay,
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block, the model uses the average as its weights."""
        with torch.no_grad():
            kept = {n: w.detach().clone() for n, w in self._weights.items()}
            self._put(self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                self._put(kept)

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            local(weight.detach()).copy_(local(values[name]))
        self._step.publish()
