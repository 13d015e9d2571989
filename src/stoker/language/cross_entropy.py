"""Cross-entropy combined with the projection that computes the logits, one chunk of tokens at a time.

The logits are the largest tensor of a batch: 4,096 tokens over a vocabulary of 128 thousand take 2 GB in
float32, and the loss and its gradient need several times that. Here they exist only for a chunk of tokens:
the gradient of a chunk is computed together with its loss, in the forward pass, so that nothing has to be
kept or recomputed. The idea is from Liger (Hsu et al. 2024, arXiv:2410.10989) and cut cross-entropy
(Wijmans et al. 2024, arXiv:2411.09009). Tokens without a label are removed before the projection, which
changes neither the loss nor a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from stoker.data.tokens import NO_LOSS
from torch.nn import functional as F

CHUNK = 2**26
"""Bytes of a chunk's logits in float32. If all logits together are fewer, they are computed at once."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK,
) -> torch.Tensor:
    """The summed cross-entropy of `hidden @ weight.T + bias`, in nats; a float32 scalar.

    Under autocast, products have autocast's dtype, as with `F.linear`; the loss is computed in float32.

    Args:
        hidden: (..., width).
        weight: (vocabulary, width).
        labels: int64, shaped like `hidden` without its width; NO_LOSS where nothing is predicted.
        bias: (vocabulary,).
        chunk_bytes: approximate size of a chunk's logits.
    """
    flat = labels.flatten()
    counted = (flat != NO_LOSS).nonzero().squeeze(1)
    chosen = hidden.flatten(0, -2).index_select(0, counted)
    targets = flat.index_select(0, counted)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        chosen, weight = chosen.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    if not torch.is_grad_enabled():  # a function computes gradients of what requires them, all the same
        chosen, weight, bias = chosen.detach(), weight.detach(), None if bias is None else bias.detach()
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        if len(targets) <= rows:
            logits = F.linear(chosen, weight, bias).float()
            return F.cross_entropy(logits, targets, reduction="sum")
        total: torch.Tensor = _InChunks.apply(chosen, weight, bias, targets, rows)  # type: ignore[no-untyped-call]
        return total


class _InChunks(torch.autograd.Function):
    """See `linear_cross_entropy`: `hidden` is (tokens, width), `targets` (tokens,), all of which count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            logits = F.linear(hidden[part], weight, bias).float()
            target = targets[part].unsqueeze(1)
            logits -= logits.amax(1, keepdim=True)
            wanted = logits.gather(1, target)
            summed = logits.exp_().sum(1, keepdim=True)  # in place: one exponential, and no copy of a chunk
            total += (summed.log() - wanted).sum()
            if not (of_hidden or of_weight or of_bias):
                continue
            gradient = logits.div_(summed)
            gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand_as(target))
            if bias_grad is not None:
                bias_grad += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if weight_grad is not None:
                _add_product(weight_grad, gradient.T, hidden[part])
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = gradients
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden_grad is None else hidden_grad.mul_(factor),
            None if weight_grad is None else weight_grad.mul_(factor).to(weight_dtype),
            None if bias_grad is None else bias_grad.mul_(factor).to(bias_dtype),
            None,
            None,
        )


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to a float32 matrix; sums in half precision would lose the chunks' contributions."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
