"""Which parameters are trained at the moment: a script may freeze and unfreeze some on the way."""

from __future__ import annotations

from torch import nn


class Trained:
    """The trained parameters of a model, and whether they have changed."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._last: list[bool] | None = None

    def changed(self) -> bool:
        """Whether some were frozen or unfrozen since this was asked last; true when first asked."""
        now = [p.requires_grad for p in self._parameters]
        before, self._last = self._last, now
        return now != before
