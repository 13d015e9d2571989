"""The floating-point operations per token for training a causal language model."""

from __future__ import annotations

from typing import Any

from stoker.language.lora import as_trained, is_adapter, without_adapters
from stoker.language.quantised import Linear4bit
from torch import nn
from transformers.pytorch_utils import Conv1D


def per_token(model: Any, *, context: float, labelled: float = 1.0) -> float:
    """The necessary operations of a forward and backward pass per token.

    A product with a weight takes 2 operations per entry in the forward pass, 2 for the gradient of its
    input, and 2 for the gradient of the weight, if it is trained (Kaplan et al. 2020, arXiv:2001.08361). A
    token's attention takes 4 for each entry of all heads and each token that it sees, and twice as many in
    the backward pass. Embedding lookups take none.

    Args:
        model: with or without adapters; it can be on the meta device.
        context: the mean number of tokens that a token sees, including itself.
        labelled: the share of tokens that have a label: only these are projected onto the vocabulary.
    """
    bare = without_adapters(model)
    head = as_trained(bare.get_output_embeddings())
    unused = {id(m.original_module) for m in model.modules() if as_trained(m) is not m}
    total = 0.0
    for module in model.modules():
        if is_adapter(module) or id(module) in unused:
            continue
        entries, trained = _product(module)
        total += (6 if trained else 4) * entries * (labelled if module is head else _active(bare, module))
    config = bare.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(total + 12 * config.num_hidden_layers * width * context)


def _product(module: nn.Module) -> tuple[int, bool]:
    """The number of a module's own weight entries that it multiplies with, and whether they are trained."""
    if isinstance(module, Linear4bit):
        return module.in_features * module.out_features, False
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel(), module.weight.requires_grad
    experts = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return sum(p.numel() for p in experts), any(p.requires_grad for p in experts)


def _active(model: Any, module: nn.Module) -> float:
    """The share of a module that each token passes: a part of a mixture's experts, all of anything else."""
    if not any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return 1.0
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return float(chosen / experts) if experts and chosen else 1.0
