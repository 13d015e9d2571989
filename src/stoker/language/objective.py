"""The inputs of a causal model and its loss: next-token cross-entropy, if possible in the output layer.

A model's output layer, when asked for a loss, returns the summed loss instead of the logits, so that the full
logits are never in memory (`cross_entropy`). It is computed in the layer's own forward, where every strategy
has the layer's weights available.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from stoker.data.tokens import NO_LOSS
from stoker.language import attention, rotary, routing
from stoker.language.cross_entropy import linear_cross_entropy
from stoker.language.lora import as_trained, without_adapters
from torch import nn
from torch.nn import functional as F

_LABELS = "next_tokens"
"""The keyword argument with the token that follows each: int64 (rows, seq), or NO_LOSS."""


@dataclass(frozen=True)
class Objective:
    """How a model is called with a batch, and how its loss is computed."""

    in_head: bool
    """Whether the model's output layer computes the loss."""
    packs: bool
    """Whether its attention takes the documents of a row; if not, each row has one document and padding."""
    routing: routing.Routing | None = None
    """In training, the loss of a mixture's routers."""

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The model's arguments for rows of `PackedDataset`, or for `input_ids` alone."""
        called: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        for name in ("position_ids", attention.DOCUMENTS):
            if self.packs and name in batch:
                called[name] = batch[name]
        if self.in_head and "labels" in batch:
            called[_LABELS] = _following(batch["labels"])
        return called

    def loss(self, output: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed next-token cross-entropy, in nats, and the number of tokens that count.

        The loss of a mixture's routers is a mean over tokens: it is added once for each token that counts.
        """
        wanted = _following(batch["labels"])
        counted = (wanted != NO_LOSS).sum()
        if self.in_head:
            total = output.logits
        else:
            logits = output.logits.flatten(0, 1).float()
            total = F.cross_entropy(logits, wanted.flatten(), ignore_index=NO_LOSS, reduction="sum")
        if self.routing is not None:
            total = total + self.routing.loss(output, batch) * counted
        return total, counted


def attach(model: Any, router_aux_loss: float | None = None) -> Objective:
    """Make a transformers causal model, with or without adapters, compute its loss in its output layer.

    Also makes rotary embeddings depend on each document's own length only (`rotary`). If the logits are
    more than the output of that layer (capped, scaled, with an adapter), it is not changed.

    Args:
        router_aux_loss: the weight of the routers' loss in training, see `routing.attach`.

    Raises:
        BadInput: a weight is given, and the model's family has no such loss.
    """
    bare = without_adapters(model)
    packs = bare.config._attn_implementation == attention.NAME
    if packs:
        rotary.by_document(bare)
    routed = routing.attach(model, router_aux_loss)
    head = as_trained(bare.get_output_embeddings())
    if type(head) is not nn.Linear or not _ends_with_head(bare):
        return Objective(in_head=False, packs=packs, routing=routed)
    plain = head.forward
    wanted: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not wanted:
            return plain(hidden)
        return linear_cross_entropy(hidden, head.weight, wanted[-1], bias=head.bias)

    def take_labels(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        labels = kwargs.pop(_LABELS, None)
        wanted[:] = [] if labels is None else [labels]
        return args, kwargs

    def drop_labels(*_: Any) -> None:
        wanted.clear()

    head.forward = forward  # type: ignore[method-assign, assignment]
    model.register_forward_pre_hook(take_labels, with_kwargs=True)
    model.register_forward_hook(drop_labels, always_call=True)
    return Objective(in_head=True, packs=packs, routing=routed)


def _following(labels: torch.Tensor) -> torch.Tensor:
    """The label of the next token: (rows, seq); nothing follows the last."""
    return F.pad(labels[:, 1:], (0, 1), value=NO_LOSS)


def _ends_with_head(model: Any) -> bool:
    """Whether a model's logits are the output of its output layer, neither scaled nor capped.

    False for a model that cannot be tried without values (Phi MoE looks at its positions).
    """
    if model.config._attn_implementation != attention.NAME:  # others look at values, which do not exist
        return False
    config = copy.deepcopy(model.config)
    attention.forget_padding(config)
    with torch.device("meta"), torch.no_grad():
        tried = type(model)._from_config(config, dtype=torch.bfloat16).eval()
        given: list[Any] = []
        tried.get_output_embeddings().register_forward_hook(lambda *called: given.append(called[2]))
        try:
            output = tried(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except RuntimeError:
            return False
    return bool(given) and output.logits is given[-1]
