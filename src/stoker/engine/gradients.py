"""Gradients of a sum, made into gradients of a mean over the whole global batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def divide(parameters: Iterable[torch.nn.Parameter], weight: torch.Tensor | float) -> None:
    """Divide every gradient by the weight of the global batch; a weight of zero leaves them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    divisor = torch.as_tensor(weight, dtype=torch.float32, device=gradients[0].device)
    divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    torch._foreach_div_(gradients, divisor)
