"""The buffers of a model before a pass, so that a pass that does not count leaves no trace in them.

A forward pass in training mode changes them (BatchNorm's running statistics), before its loss is known.
"""

from __future__ import annotations

import torch
from torch import nn


class Buffers:
    """A copy of a model's buffers; empty until `keep` is called."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        now = dict(self._model.named_buffers())
        if _sizes(now) != _sizes(self._kept):
            self._kept = {name: buffer.clone() for name, buffer in now.items()}
        elif now:
            torch._foreach_copy_(list(self._kept.values()), list(now.values()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the buffers that have been kept; one that was created since stays."""
        for name, buffer in self._model.named_buffers():
            if name in self._kept:
                buffer.copy_(self._kept[name])


def _sizes(buffers: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    return {name: (b.shape, b.dtype, b.device) for name, b in buffers.items()}
