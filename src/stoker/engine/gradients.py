"""Turns gradients of a sum into gradients of the mean over the whole global batch, and clips them.

One pass does everything: dividing by the weight, undoing the strategy's averaging and the loss scaling, and
clipping are combined into one factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from stoker.engine.agreement import Weight
from stoker.tensors import local
from torch.distributed.tensor import DTensor

_BUCKET = 25 * 2**20  # bytes reduced at once


def of(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that exist."""
    return [p.grad for p in parameters if p.grad is not None]


def norm(gradients: list[torch.Tensor], stages: Any = None) -> torch.Tensor:
    """The L2 norm over all gradients, a float32 scalar, including shards and stages of other ranks.

    Args:
        stages: the process group over which the parameters are split into pipeline stages, if they are.
    """
    held = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    total = torch.nn.utils.get_total_norm(held) if held else torch.zeros(())
    if isinstance(total, DTensor):
        total = total.full_tensor()
    total = total.float()
    if stages is not None and dist.get_world_size(stages) > 1:
        squared = total.square()
        dist.all_reduce(squared, group=stages)
        total = squared.sqrt()
    return total


def scale(gradients: list[torch.Tensor], factor: torch.Tensor | float) -> None:
    """Multiply every gradient in place, including gradients in host memory, where FSDP can offload them."""
    if gradients:
        held = [local(g) for g in gradients]
        torch._foreach_mul_(held, factor.to(held[0].device) if isinstance(factor, torch.Tensor) else factor)


def clipped(factor: torch.Tensor, norm: torch.Tensor, clip_norm: float | None) -> torch.Tensor:
    """The factor that gradients are scaled by, reduced if the scaled norm exceeds `clip_norm`."""
    if clip_norm is None:
        return factor
    return factor * (clip_norm / (norm * factor + 1e-6)).clamp(max=1.0)


def reciprocal(weight: torch.Tensor) -> torch.Tensor:
    """1 / weight, or 1 for a weight of zero, which leaves gradients of zero."""
    return 1.0 / divisor(weight)


def divisor(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or 1 for a weight of zero: sums over nothing are zero, not NaN."""
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def counted(loss: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The loss of a part, or zero if nothing in it has a weight: the mean over nothing is NaN."""
    if isinstance(weight, torch.Tensor):
        return torch.where(weight.to(loss.device) == 0, torch.zeros_like(loss), loss)
    return loss if weight else torch.zeros_like(loss)


def agree(parameters: list[torch.nn.Parameter], group: Any) -> None:
    """Give parameters a gradient of zero if they have none here, but one on another rank of the group."""
    # By gloo, from host to host, so that no rank waits for its GPU.
    there = torch.tensor([_kind(p.grad) for p in parameters], dtype=torch.int32, device="cpu")
    dist.all_reduce(there, op=dist.ReduceOp.MAX, group=group)
    for parameter, kind in zip(parameters, there.tolist(), strict=True):
        if kind and parameter.grad is None:
            parameter.grad = _no_rows(parameter) if kind == _SPARSE else torch.zeros_like(parameter)


_DENSE, _SPARSE = 1, 2


def _kind(gradient: torch.Tensor | None) -> int:
    return 0 if gradient is None else _SPARSE if gradient.is_sparse else _DENSE


def _no_rows(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The sparse gradient of an embedding of which no row was used."""
    none = parameter.new_empty((1, 0), dtype=torch.int64)
    rows = parameter.new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(none, rows, parameter.shape, is_coalesced=True, check_invariants=False)


def average(gradients: list[torch.Tensor], group: Any) -> None:
    """Replace gradients by their mean over the ranks of a group: dense ones in buckets."""
    ranks = dist.get_world_size(group)
    for gradient in (g for g in gradients if g.is_sparse):
        dist.all_reduce(gradient, group=group)
        gradient.div_(ranks)
    for bucket in _buckets([g for g in gradients if not g.is_sparse]):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=group)
        flat /= ranks
        means = torch.split(flat, [g.numel() for g in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= _BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
