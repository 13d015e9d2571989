"""Muon for hidden matrices, AdamW for all other parameters, in one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) steps a matrix by its momentum made
orthogonal, scaled so that learning rates and weight decay tuned for AdamW stay right (Liu et al. 2025,
arXiv:2502.16982). That takes the whole matrix. If matrices are sharded, each rank is sent whole ones in turn,
and returns to every other rank its shard of the result: the work is divided over ranks as the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from stoker.tensors import like
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2


class Muon(torch.optim.AdamW):
    """See the module docstring.

    Groups with `"orthogonal": True` have parameters of two dims, or of three, which are stacks of matrices,
    such as experts. Their state is a `momentum_buffer`. All other groups are AdamW's, with its settings.

    Args:
        momentum: decay rate of the moving average of the gradients of matrices; Nesterov's.
        settings: see `torch.optim.AdamW`.
    """

    def __init__(self, params: Any, *, momentum: float = 0.95, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            group.setdefault("orthogonal", False)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["orthogonal"]:
                self._step_matrices([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_matrices(self, parameters: Sequence[Any], group: dict[str, Any]) -> None:
        at_once = max(map(_ranks, parameters), default=1)
        for first in range(0, len(parameters), at_once):
            some = parameters[first : first + at_once]
            for parameter, update in zip(
                some, orthogonal([self._moved(p, group) for p in some]), strict=True
            ):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = _RMS_OF_ADAMW * math.sqrt(max(parameter.shape[-2:]))
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)

    def _moved(self, parameter: Any, group: dict[str, Any]) -> Tensor:
        """Take the gradient into the momentum; returns Nesterov's."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        moved: Tensor = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])
        return moved.bfloat16() if moved.is_cuda else moved.float()


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`newton_schulz` of each matrix. If they are sharded, all ranks call it with the same ones.

    Args:
        matrices: of two dims, or stacks of three; at most as many as the ranks that have shards of one.
    """
    together = [m for m in matrices if m.dim() == 2 and _ranks(m) > 1]
    shared_out = iter(_shared_out(cast("list[DTensor]", together)))
    return [next(shared_out) if m.dim() == 2 and _ranks(m) > 1 else _of_each_rank(m) for m in matrices]


def newton_schulz(matrices: Tensor) -> Tensor:
    """The matrix U·V' for each matrix U·S·V', nearly: its singular values lie between about 0.5 and 1.5.

    Args:
        matrices: (..., rows, columns); the iterations run in their dtype.
    """
    a, b, c = _COEFFICIENTS
    upright = matrices.shape[-2] > matrices.shape[-1]
    stack = (matrices.mT if upright else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = stack / torch.linalg.matrix_norm(stack, keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    made: Tensor = (x.mT if upright else x).reshape(matrices.shape)
    return made


def _ranks(matrices: Tensor) -> int:
    """The number of ranks that have shards of a tensor."""
    if not isinstance(matrices, DTensor):
        return 1
    return math.prod(matrices.device_mesh.size(n) for n, p in enumerate(matrices.placements) if p.is_shard())


def _of_each_rank(matrices: Tensor) -> Tensor:
    """Of a tensor that is whole, or of a stack, of which each rank has whole matrices."""
    if not isinstance(matrices, DTensor):
        return newton_schulz(matrices)
    assert all(not p.is_shard() or p == Shard(0) for p in matrices.placements), matrices.placements
    return like(matrices, newton_schulz(matrices.to_local()))


def _shared_out(matrices: Sequence[DTensor]) -> list[Tensor]:
    """Of matrices sharded by rows, at most as many as ranks: rank i computes number i."""
    if not matrices:
        return []
    mesh = matrices[0].device_mesh
    (dim,) = (n for n, placement in enumerate(matrices[0].placements) if placement == Shard(0))
    group, rank, ranks = mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim)
    shards = [m.to_local() for m in matrices]
    sizes = [s.numel() for s in shards] + [0] * (ranks - len(shards))
    mine = matrices[rank].shape if rank < len(matrices) else torch.Size([0, 0])
    of_mine = [rows * mine[1] for rows in _rows(mine[0], ranks)]
    whole = shards[0].new_empty(mine.numel())
    dist.all_to_all_single(whole, torch.cat([s.flatten() for s in shards]), of_mine, sizes, group=group)
    if mine.numel():
        whole = newton_schulz(whole.view(mine)).flatten()
    back = whole.new_empty(sum(sizes))
    dist.all_to_all_single(back, whole, sizes, of_mine, group=group)
    parts = torch.split(back, sizes[: len(shards)])
    return [like(m, part.view(s.shape)) for m, part, s in zip(matrices, parts, shards, strict=True)]


def _rows(rows: int, ranks: int) -> list[int]:
    """The rows that each rank has, as `torch.chunk` divides them."""
    most = -(-rows // ranks)
    return [min(max(rows - most * rank, 0), most) for rank in range(ranks)]
