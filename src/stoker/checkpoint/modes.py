"""Tracks which modules have a different mode (training or evaluation) than when training began."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Modes:
    """The modes of a model's modules, as changed by a loop during training.

    What a script sets before its loop, it sets again at each start, so only later changes are restored, when
    training begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first: dict[str, bool] | None = None
        self._saved: dict[str, bool] = {}

    def begin(self) -> None:
        """Record the modes when training begins."""
        if self._first is None:
            self._first = _modes(self._model)
            self._put()

    def changed(self) -> dict[str, bool]:
        """Modules whose mode has changed since training began: whether it is training mode."""
        first = self._first
        if first is None:
            return self._saved
        return {n: mode for n, mode in _modes(self._model).items() if mode != first.get(n, mode)}

    def restore(self, changed: Mapping[str, bool]) -> None:
        """Restore what `changed` returned, when training begins."""
        self._saved = dict(changed)
        if self._first is not None:
            self._put()

    def _put(self) -> None:
        for name, module in self._model.named_modules():
            module.training = self._saved.get(name, module.training)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}
