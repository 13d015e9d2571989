"""An optimizer that steps within the backward pass, a parameter at a time, as soon as its gradient is there.

So the gradients of all parameters never stand in memory together: of a model that is trained whole they
take as much as its weights (Lv et al. 2023, arXiv:2306.09782). What needs all gradients before any weight
moves is not to be had with it: clipping by the global norm, accumulation, a reduction over ranks.
"""

from __future__ import annotations

from typing import Any

import torch


def attach(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer step each of its parameters in the backward pass, and free its gradient.

    It stays one optimizer, with one state and its groups: what changes these, or saves them, need not know.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_stepping(optimizer, group))


def _stepping(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Any:
    def step(parameter: torch.Tensor) -> None:
        every = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = every
        parameter.grad = None

    return step
