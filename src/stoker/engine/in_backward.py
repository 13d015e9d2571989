"""An optimizer that steps within the backward pass, each parameter as soon as its gradient is ready.

So the gradients of all parameters are never in memory at once; in full fine-tuning they take as much memory
as the weights (Lv et al. 2023, arXiv:2306.09782). This excludes everything that needs all gradients before
any weight is updated: clipping by the global norm, accumulation, reduction over ranks.
"""

from __future__ import annotations

from typing import Any

import torch


class InBackward:
    """Lets an optimizer step each of its parameters in the backward pass, and frees the gradient.

    It remains one optimizer with one state and one set of groups, so code that changes or saves these is
    not affected. Values that it counts per group (such as steps) are the same for all parameters, and
    advance once per backward pass.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._attached: set[torch.Tensor] = set()
        self._counted: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.begin()

    def begin(self) -> None:
        """Prepare for a backward pass, including parameters added to the optimizer since the last one."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self._attached:
                    self._attached.add(parameter)
                    parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._step(p, group))

    def end(self) -> None:
        """Finish the backward pass."""
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
