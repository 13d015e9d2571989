"""The repeated blocks of a model: the units that are sharded, recomputed, compiled and cut into stages.

They are found from the model's structure: the list of modules (`nn.ModuleList`, `nn.Sequential`) that
holds most of its parameters, or the lists inside its items, if these hold lists themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stoker.errors import BadInput
from torch import nn


def find(model: nn.Module, names: Sequence[str] = ()) -> list[tuple[str, nn.Module]]:
    """The blocks of a model with their names, in order; empty if the model has no repeated part.

    Args:
        names: class names of blocks; by default blocks are detected.

    Raises:
        BadInput: the model has no module of a named class.
    """
    if names:
        found = [(name, m) for name, m in model.named_modules() if type(m).__name__ in names]
        missing = set(names) - {type(m).__name__ for _, m in found}
        if missing:
            classes = sorted({type(m).__name__ for m in model.modules()})
            raise BadInput(
                f"blocks: no module is a {', '.join(sorted(missing))}; the model has {', '.join(classes)}"
            )
        return found
    found_list = longest(model)
    if found_list is None:
        return []
    prefix, modules = found_list
    found = []
    for name, block in modules.named_children():
        inner = find(block)  # a ResNet's stages hold layers: those are its blocks
        found += (
            [(f"{prefix}{name}.{n}", m) for n, m in inner] if len(inner) > 1 else [(prefix + name, block)]
        )
    return [(name, block) for name, block in found if _parameters(block)]


def largest(blocks: Iterable[tuple[str, nn.Module]]) -> int:
    """Bytes of the largest block's parameters; 0 if there are no blocks."""
    return max((sum(p.nbytes for p in block.parameters()) for _, block in blocks), default=0)


def longest(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The list of modules that holds the most parameters, if more than half of all, and its dotted prefix."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1
    ]
    if not lists:
        return None
    name, chosen = max(lists, key=lambda pair: _parameters(pair[1]))
    if _parameters(chosen) * 2 < _parameters(model) - _embedding_parameters(model):
        return None
    return (f"{name}." if name else "", chosen)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has a BatchNorm, whose statistics are those of a micro-batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _embedding_parameters(module: nn.Module) -> int:
    """Parameters of embeddings and equally large output layers, which say nothing about what is repeated."""
    embeddings = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    shapes = {w.shape for w in embeddings}
    return sum({id(p): p.numel() for p in module.parameters() if p.shape in shapes}.values())
