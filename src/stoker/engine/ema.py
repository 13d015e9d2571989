"""A moving average of the weights (Polyak & Juditsky 1992), kept beside them shard by shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from stoker.engine import options
from torch.distributed.tensor import DTensor


class Ema:
    """The average of the trainable parameters, in float32, each where its parameter's shard is."""

    def __init__(self, model: torch.nn.Module, settings: options.Ema) -> None:
        assert settings.decay is not None
        self._decay, self._warmup = settings.decay, settings.warmup
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.values = {n: p.detach().clone().float() for n, p in self._parameters.items()}
        """By name, what is saved with a checkpoint."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
        torch._foreach_lerp_(
            [_local(v) for v in self.values.values()],
            [_local(p.detach()).float() for p in self._parameters.values()],
            1.0 - decay,
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights within this block."""
        with torch.no_grad():
            kept = {n: p.detach().clone() for n, p in self._parameters.items()}
            self._put(self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                self._put(kept)

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            _local(parameter.detach()).copy_(_local(values[name]))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
