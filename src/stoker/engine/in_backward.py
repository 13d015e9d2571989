"""An optimizer that steps within the backward pass, a parameter at a time, as soon as its gradient is there.

So the gradients of all parameters never stand in memory together: of a model that is trained whole they
take as much as its weights (Lv et al. 2023, arXiv:2306.09782). What needs all gradients before any weight
moves is not to be had with it: clipping by the global norm, accumulation, a reduction over ranks.
"""

from __future__ import annotations

from typing import Any

import torch


class InBackward:
    """Lets an optimizer step each of its parameters in the backward pass, and frees its gradient.

    It stays one optimizer, with one state and its groups: what changes these, or saves them, need not know.
    What it counts in a group (its steps, say) is one number for all of its parameters, which moves on once a
    backward pass is over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._attached: set[torch.Tensor] = set()
        self._counted: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.begin()

    def begin(self) -> None:
        """A backward pass is to come, which steps what the optimizer was given since the last one, too."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self._attached:
                    self._attached.add(parameter)
                    parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._step(p, group))

    def end(self) -> None:
        """It is over."""
        for group, counted in self._counted:
            group.update(counted)
        self._counted.clear()

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        every = self._optimizer.param_groups
        alone = {**group, "params": [parameter]}
        self._optimizer.param_groups = [alone]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = every
        changed = {k: v for k, v in alone.items() if k != "params" and v is not group.get(k)}
        self._counted.append((group, changed))
        parameter.grad = None
