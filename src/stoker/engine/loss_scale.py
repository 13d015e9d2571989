"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, "Mixed Precision Training").

Gradients below 6e-8 vanish in fp16, so the loss is multiplied before the backward pass and the
gradients are divided after it, in float32. If they overflow, the step is skipped and the scale is
halved; after `patience` steps without overflow it is doubled. torch's GradScaler does the same
for one optimizer on one device; this one works on gradients whose norm was already reduced over
shards and stages, and its state is three numbers.

A loss here is a sum, which can itself be too large for fp16: it is divided by a constant close to
the weight of a global batch, a power of two so that no bit is lost.
"""

from __future__ import annotations

import math
from typing import Any


class LossScale:
    """The factor that the loss is multiplied by. Always 1 unless `enabled`."""

    def __init__(self, enabled: bool, initial: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.divisor: float | None = None if enabled else 1.0
        """Approximately the weight of a global batch; determined at the first step."""
        self._patience = patience
        self._steps = 0

    @property
    def factor(self) -> float:
        """The factor for the loss before its backward pass."""
        assert self.divisor is not None
        return self.value / self.divisor

    def fit(self, weight: float) -> None:
        """Choose the divisor for the weight of a global batch."""
        self.divisor = 2.0 ** round(math.log2(weight)) if weight > 0 else 1.0

    def update(self, overflowed: bool) -> None:
        """After a step: halve, count, or double."""
        if not self.enabled:
            return
        if overflowed:
            self.value, self._steps = max(self.value / 2, 1.0), 0
            return
        self._steps += 1
        if self._steps >= self._patience:
            self.value, self._steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """The values to restore, as JSON."""
        return {"value": self.value, "steps": self._steps, "divisor": self.divisor}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if self.enabled and state:
            self.value, self._steps = float(state["value"]), int(state["steps"])
            self.divisor = state["divisor"]
