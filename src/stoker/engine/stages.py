"""Splits a model into stages that keep the names of its parameters.

A stage is the model itself with fewer blocks: the containers on the path to the list of blocks are
copied, without their parameters, and everything else is shared. So nothing is traced or renamed, and
all stages of a rank together form one model again, for the optimizer and checkpoints.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from stoker.engine import blocks
from stoker.errors import BadInput
from torch import nn

# Families whose forward pass does nothing between blocks that a stage would not do; tested.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2")


@dataclass(frozen=True)
class Cut:
    """The blocks that each stage holds, as a range of numbers per stage."""

    prefix: str
    """Dotted path to the list of blocks, ending in a dot."""
    ranges: tuple[range, ...]


def balance(costs: Sequence[int], stages: int) -> tuple[range, ...]:
    """Contiguous ranges of blocks that minimise the cost of the most expensive one (dynamic programming).

    Args:
        costs: the cost of each block, such as its parameters; modules before and after the blocks count
            towards the first and the last.

    Raises:
        BadInput: there are more stages than blocks.
    """
    count = len(costs)
    if stages > count:
        raise BadInput(f"{stages} pipeline stages, but the model has {count} blocks: use {count} or fewer")
    sums = [0, *itertools.accumulate(costs)]
    best: list[list[tuple[int, list[int]]]] = [[(sums[n], [n]) for n in range(count + 1)]]
    for stage in range(1, stages):
        row = []
        for end in range(count + 1):
            options = [
                (max(best[stage - 1][cut][0], sums[end] - sums[cut]), [*best[stage - 1][cut][1], end])
                for cut in range(stage, end)
            ]
            row.append(min(options, default=(sums[-1] + 1, [])))
        best.append(row)
    ends = best[-1][count][1]
    return tuple(range(begin, end) for begin, end in itertools.pairwise([0, *ends]))


def cut(model: nn.Module, stages: int) -> Cut:
    """Where to split a model.

    Raises:
        BadInput: there are more stages than blocks, the model cannot be split, or stages would share a
            parameter.
    """
    found = blocks.longest(model)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if found is None or (not isinstance(model, nn.Sequential) and family not in FAMILIES):
        raise BadInput(
            f"parallel=pipeline cannot split a {type(model).__name__}: it supports nn.Sequential, and causal "
            f"language models of the families {', '.join(FAMILIES)}; use ddp or fsdp for others"
        )
    prefix, modules = found
    costs = [sum(p.numel() for p in block.parameters()) for block in modules.children()]
    first, last = _outside(model, prefix)
    costs[0] += first
    costs[-1] += last
    made = Cut(prefix, balance(costs, stages))
    _check_shared(model, made)
    return made


def take(model: nn.Module, made: Cut, held: Sequence[int]) -> nn.Module:
    """The part of a model that some of the stages hold together: copied containers that share all else."""
    kept = [n for stage in held for n in made.ranges[stage]]
    last = len(made.ranges) - 1
    path = made.prefix.rstrip(".").split(".") if made.prefix else []
    return _pruned(model, path, set(kept), first=0 in held, last=last in held)


def _pruned(module: nn.Module, path: list[str], kept: set[int], *, first: bool, last: bool) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    if not path:  # this is the list of blocks
        names = list(module._modules)
        copied._modules = {name: module._modules[name] for n, name in enumerate(names) if n in kept}
        return copied
    on_the_way = path[0]
    passed = False
    for name, child in module._modules.items():
        if name == on_the_way:
            assert child is not None
            copied._modules[name] = _pruned(child, path[1:], kept, first=first, last=last)
            passed = True
        elif child is not None and not (last if passed else first):
            copied._modules[name] = _replacement(child, before=not passed)
    if hasattr(copied, "config"):
        copied.config = _config_of_blocks(copied.config, sorted(kept))
    return copied


def _replacement(child: nn.Module, *, before: bool) -> nn.Module:
    """The replacement, in a stage, for a module that belongs to another stage."""
    if before and isinstance(child, nn.Embedding):
        return _Nothing()
    has_state = any(True for _ in child.parameters())
    return nn.Identity() if has_state or isinstance(child, nn.Dropout) else child


class _Nothing(nn.Module):
    """Replaces an embedding whose result was already added in the first stage."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=ids.device)


def _config_of_blocks(config: Any, kept: list[int]) -> Any:
    """A transformers config that describes only these blocks."""
    if not hasattr(config, "num_hidden_layers"):
        return config
    copied = copy.copy(config)
    types = getattr(config, "layer_types", None)
    if types is not None:
        copied.__dict__["layer_types"] = [types[n] for n in kept]
    copied.__dict__["num_hidden_layers"] = len(kept)
    return copied


def _outside(model: nn.Module, prefix: str) -> tuple[int, int]:
    """The number of parameters before and after the blocks."""
    sizes = [0, 0]
    passed = False
    for name, parameter in model.named_parameters():
        if prefix and name.startswith(prefix):
            passed = True
        elif prefix:
            sizes[passed] += parameter.numel()
    return sizes[0], sizes[1]


def _check_shared(model: nn.Module, made: Cut) -> None:
    """Raises BadInput if a parameter would be in two stages."""
    places: dict[int, set[int]] = {}
    names: dict[int, list[str]] = {}
    for stage in range(len(made.ranges)):
        for name, parameter in take(model, made, [stage]).named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), set()).add(stage)
            names.setdefault(id(parameter), []).append(name)
    shared = next((names[key] for key, stages in places.items() if len(stages) > 1), None)
    if shared is not None:
        raise BadInput(
            f"pipeline stages would share a parameter, {' = '.join(sorted(set(shared)))}: "
            "untie it (tie_word_embeddings=false), or use ddp or fsdp"
        )
