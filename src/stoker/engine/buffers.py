"""The buffers of a model before a pass, so that a pass that does not count leaves no trace in them.

A forward pass in training mode changes them (BatchNorm's running statistics), before its loss is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stoker.tensors import is_plain
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_LARGE = 2**20  # values; larger buffers of integers are quantised weights, which no pass changes


@dataclass
class _Kept:
    module: nn.Module
    name: str
    buffer: torch.Tensor | None
    copy: torch.Tensor | None
    """Its values; None if nothing can have written to it in place."""
    version: int

    @property
    def copy_is_old(self) -> bool:
        """Whether the buffer was written to since it was copied."""
        return self.buffer is not None and self.buffer._version != self.version


class Buffers:
    """A copy of a model's buffers; empty until `keep` is called.

    A buffer that is not persistent and that a pass replaces is left as it is: it is a cache, for which the
    module has attributes too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[tuple[nn.Module, str], _Kept] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now; those that have not changed since the last time are not read."""
        kept: dict[tuple[nn.Module, str], _Kept] = {}
        stale: list[_Kept] = []
        for module in self._model.modules():
            # Running statistics are written by kernels that do not count versions.
            silent = isinstance(module, _NormBase)
            for name, buffer in module._buffers.items():
                known = self._kept.get((module, name))
                if known is None or known.buffer is not buffer or not _has_shape_of(known.copy, buffer):
                    known = _copied(module, name, buffer)
                elif known.copy is not None and (silent or known.copy_is_old):
                    stale.append(known)
                kept[module, name] = known
        if stale:
            torch._foreach_copy_([one.copy for one in stale], [one.buffer for one in stale])  # type: ignore[misc]
            for one in stale:
                assert one.buffer is not None
                one.version = one.buffer._version
        self._kept = kept

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the buffers as they were kept."""
        for one in self._kept.values():
            now = one.module._buffers.get(one.name)
            if now is not one.buffer and one.name in one.module._non_persistent_buffers_set:
                continue
            one.module._buffers[one.name] = one.buffer
            if one.buffer is not None and one.copy is not None:
                one.buffer.copy_(one.copy)


def _copied(module: nn.Module, name: str, buffer: torch.Tensor | None) -> _Kept:
    if buffer is None or not _is_written(buffer):
        return _Kept(module, name, buffer, None, 0)
    return _Kept(module, name, buffer, buffer.clone(), buffer._version)


def _is_written(buffer: torch.Tensor) -> bool:
    """Whether a pass may write to a buffer in place."""
    if not is_plain(buffer) or buffer.is_inference():
        return False
    overlaps = any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
    exact = buffer.is_floating_point() or buffer.is_complex()
    return not overlaps and (exact or buffer.numel() < _LARGE)


def _has_shape_of(copy: torch.Tensor | None, buffer: torch.Tensor | None) -> bool:
    return copy is None or (buffer is not None and copy.shape == buffer.shape)
