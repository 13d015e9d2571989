"""An optimizer that steps within the backward pass, a parameter at a time, as soon as its gradient is there.

So the gradients of all parameters never stand in memory together: of a model that is trained whole they
take as much as its weights (Lv et al. 2023, arXiv:2306.09782). What needs all gradients before any weight
moves is not to be had with it: clipping by the global norm, accumulation, a reduction over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def attach(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Let an optimizer step each of its parameters in the backward pass, and free its gradient.

    It stays one optimizer, with one state and its groups: what changes these, or saves them, need not know.
    What it counts in a group (its steps, say) is one number for all of its parameters: it moves on where what
    is returned is called, after the backward pass.
    """
    moved: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    for group, after in zip(optimizer.param_groups, moved, strict=True):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_stepping(optimizer, group, after))

    def move_on() -> None:
        for group, after in zip(optimizer.param_groups, moved, strict=False):  # some may have come since
            group.update(after)
            after.clear()

    return move_on


def _stepping(optimizer: torch.optim.Optimizer, group: dict[str, Any], after: dict[str, Any]) -> Any:
    def step(parameter: torch.Tensor) -> None:
        every = optimizer.param_groups
        alone = {**group, "params": [parameter]}
        optimizer.param_groups = [alone]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = every
        after.update({k: v for k, v in alone.items() if k != "params" and v is not group.get(k)})
        parameter.grad = None

    return step
