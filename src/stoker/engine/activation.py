"""Activation checkpointing: activations freed after the forward pass and computed again in the backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174). The blocks
stay the modules they were, with the names they had: only their `forward` is wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from stoker.engine import options
from stoker.errors import BadInput
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = (  # what costs more to compute again than to keep
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


def apply(blocks: Sequence[tuple[str, nn.Module]], how: str) -> None:
    """Recompute blocks in their backward pass.

    Args:
        how: none, full, selective (the results of products are kept), or every how many blocks.

    Raises:
        BadInput: there are no blocks to recompute.
    """
    kind, every = options.checkpointing(how)
    if kind == "none":
        return
    if not blocks:
        raise BadInput(
            f"activation_checkpointing={how}: no repeated blocks were found; name their classes with blocks="
        )
    contexts = {"context_fn": _selective} if kind == "selective" else {}
    for _, block in blocks[every - 1 :: every]:
        block.forward = _recomputed(block, block.forward, contexts)


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], contexts: dict[str, Any]
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return run


def _selective() -> Any:
    packets = [getattr(torch.ops.aten, name, None) for name in _PRODUCTS]
    kept = {getattr(packet, overload) for packet in packets if packet for overload in packet.overloads()}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
