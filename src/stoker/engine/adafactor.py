"""torch's Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), extended to sharded parameters.

Adafactor keeps one mean per row and one per column of a matrix. torch computes these only for whole
matrices, so a sharded matrix is gathered together with its gradient while it is stepped, one matrix after the
other; each rank keeps its shard of the result. The means are small, and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stoker.tensors import whole
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._adafactor import adafactor


class Adafactor(torch.optim.Adafactor):
    """See the module docstring; its arguments are those of torch."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_whole(parameter, group)
        return loss

    def _step_whole(self, parameter: Any, group: dict[str, Any]) -> None:
        full = nn.Parameter(parameter.full_tensor())
        full.grad = parameter.grad.full_tensor()
        # Restored means of a vector, which are as long as it is, come back sharded.
        self.state[full] = {key: whole(value) for key, value in self.state.pop(parameter, {}).items()}
        held: tuple[list[Any], ...] = ([], [], [], [], [], [])
        self._init_group({**group, "params": [full]}, *held)
        eps1, eps2 = group["eps"]
        settings = {name: group[name] for name in ("d", "lr", "beta2_decay", "weight_decay", "maximize")}
        update: Callable[..., None] = adafactor
        update(*held, **settings, eps1=eps1, eps2=eps2, foreach=False)
        self.state[parameter] = self.state.pop(full)
        mesh = parameter.device_mesh
        everywhere = DTensor.from_local(full.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.copy_(everywhere.redistribute(placements=parameter.placements))
