"""The loss that keeps the experts of a mixture in even use during training (`router_aux_loss`).

It is the one that a model's family has in transformers: the number of experts times the sum, over experts, of
the share of tokens that chose an expert and its mean probability (Switch Transformer, Fedus et al. 2021,
arXiv:2101.03961, equations 4 to 6), over the tokens of a micro-batch, without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from stoker.errors import BadInput
from stoker.language.lora import without_adapters
from torch import nn

_ASKED = "output_router_logits"


@dataclass(frozen=True)
class Routing:
    """A mixture's loss, and its weight."""

    weight: float
    experts: int
    chosen: int
    """Experts of each token."""
    balance: Callable[..., torch.Tensor]

    def loss(self, output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
        """The weighted loss of a micro-batch; 0 in evaluation, where the model is not asked for it."""
        scores = output.get("router_logits")
        if scores is None:
            return 0.0
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        real = positions < batch["documents"].sum(1, keepdim=True)
        return self.weight * self.balance(scores, self.experts, self.chosen, real)


def attach(model: Any, weight: float | None) -> Routing | None:
    """Have a causal model return what its routers decide during training; None if that is not needed.

    Args:
        model: of transformers, with or without adapters.
        weight: how much the loss counts; None: what the model's config says, which usually is nothing.

    Raises:
        BadInput: a weight is given, and the model has no experts, or its family has no such loss.
    """
    bare = without_adapters(model)
    balance = getattr(sys.modules[type(bare).__module__], "load_balancing_loss_func", None)
    given = weight is not None
    if weight is None:
        asks = getattr(bare.config.get_text_config(), _ASKED, False)
        weight = float(getattr(bare, "router_aux_loss_coef", 0.0)) if asks else 0.0
    if not weight:
        return None
    if balance is None or not hasattr(bare, "num_experts_per_tok"):
        if not given:
            return None
        raise BadInput(
            f"router_aux_loss={weight:g}: transformers has no such loss for {bare.config.model_type!r}: it "
            "is for mixtures of experts such as Mixtral, Qwen 3 MoE and gpt-oss; omit it"
        )

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, _ASKED: module.training}

    model.register_forward_pre_hook(ask, with_kwargs=True)
    return Routing(weight, bare.num_experts, bare.num_experts_per_tok, balance)
