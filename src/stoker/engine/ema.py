"""A moving average of the weights (Polyak & Juditsky 1992), kept next to them shard by shard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from stoker.engine import settings
from stoker.engine.precision import wide
from stoker.tensors import local


class Ema:
    """The average of the trained weights, in float32 or wider, each on the same rank as its weight's shard.

    Args:
        weights: by name, see `Step.weights`.
        publish: called after the weights were written, if the model uses copies of them.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        asked: settings.Ema,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        assert asked.decay is not None
        self._decay, self._warmup = asked.decay, asked.warmup
        self._weights, self._publish = dict(weights), publish
        self.values = {n: w.detach().clone().to(wide(w.dtype)) for n, w in self._weights.items()}
        """By name; saved with a checkpoint."""

    def take(self) -> None:
        """Set the average to the current weights."""
        self.restore({n: w.detach() for n, w in self._weights.items()})

    @torch.no_grad()
    def restore(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore saved values; without any, the average starts from the current weights."""
        for name, value in (values or self._weights).items():
            local(self.values[name]).copy_(local(value))

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
        self._publish()
