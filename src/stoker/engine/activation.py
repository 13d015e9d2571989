"""Activation checkpointing: free activations after the forward pass and recompute them in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174). The blocks
remain the same modules under the same names: only their `forward` is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operation
from stoker.engine.settings import checkpointing
from stoker.errors import BadInput
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {  # operations that cost more to recompute than to keep, by namespace
    "aten": (
        "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_grouped_mm",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "torch_attn": ("_varlen_attn",),
}  # fmt: skip


def apply(blocks: Sequence[tuple[str, nn.Module]], how: str) -> None:
    """Recompute blocks in their backward pass.

    Args:
        how: none, full, selective (keep the results of matrix products), or every how many blocks.

    Raises:
        BadInput: there are no blocks to recompute.
    """
    kind, every = checkpointing(how)
    if kind == "none":
        return
    if not blocks:
        raise BadInput(
            f"activation_checkpointing={how}: no repeated blocks found; name their classes with blocks="
        )
    for _, block in blocks[every - 1 :: every]:
        forward = getattr(block.forward, "recomputes", block.forward)  # unwrap a wrapped block
        block.forward = _recomputed(block, forward, _contexts(block, selective=kind == "selective"))


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], contexts: dict[str, Any]
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    run.recomputes = forward  # type: ignore[attr-defined]
    return run


def _contexts(block: nn.Module, *, selective: bool) -> dict[str, Any]:
    """The contexts for the forward pass and its recomputation; empty if none are needed."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return {"context_fn": _selective} if selective else {}

    def made() -> tuple[Any, Any]:
        first, again = _selective() if selective else (contextlib.nullcontext(), contextlib.nullcontext())
        return first, _statistics_kept(norms, again)

    return {"context_fn": made}


@contextlib.contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm], within: Any) -> Iterator[None]:
    """Freeze BatchNorm's running statistics, which have already seen these samples."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with within:
            yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted


def _selective() -> Any:
    packets = [
        getattr(getattr(torch.ops, of), name, None) for of, names in _PRODUCTS.items() for name in names
    ]
    kept = {getattr(packet, overload) for packet in packets if packet for overload in packet.overloads()}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
