"""Switches between training and evaluation mode, keeping in evaluation mode what a script has set so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode within this block."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def begin_training(model: nn.Module) -> list[str]:
    """Put a model into training mode, except those parts that a script has put into evaluation mode.

    A model that is in evaluation mode as a whole comes from `from_pretrained`, which leaves it so; and so
    does a part of it that has such a method and trained parameters. A teacher that is frozen is such a part
    too, and stays as it is.

    Returns the names of parts that are trained and stay in evaluation mode, without single modules, such as
    batch norms whose statistics are kept.
    """
    if not model.training:
        model.train()
        return []
    kept = []
    for name, module in _outermost_in_evaluation(model):
        trained = any(p.requires_grad for p in module.parameters())
        if trained and hasattr(module, "from_pretrained"):
            module.train()
        elif trained and any(True for _ in module.children()):
            kept.append(name)
    return kept


def _outermost_in_evaluation(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if child.training:
            yield from _outermost_in_evaluation(child, inner)
        else:
            yield inner, child
