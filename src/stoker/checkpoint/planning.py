"""Decides which rank writes which part of which tensor: the planning of torch.distributed.checkpoint.

A plan depends only on names, shapes and placements, so it is made once per training, not for every
checkpoint. If several ranks hold a tensor, one of them writes it, and the work is balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from stoker import distributed
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

Signature = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Part:
    """The part of a tensor that this rank writes: all that it holds of it."""

    name: str
    offsets: tuple[int, ...]
    """Its start in the full tensor, by dim."""


def signature(tensors: Mapping[str, torch.Tensor]) -> Signature:
    """What a plan depends on, as far as this rank knows."""
    return tuple((name, t.shape, t.dtype, getattr(t, "placements", None)) for name, t in tensors.items())


def parts(tensors: Mapping[str, torch.Tensor], rank: int, group: Any = None) -> list[Part]:
    """The parts that this rank writes; all ranks of the group call it, each with its tensors.

    Their order depends on the names alone: an optimizer that was loaded has its state in another order than
    one that has made its first step.

    Raises ValueError if ranks hold different tensors under the same name.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(sorted(tensors.items())), is_coordinator=rank == 0)
    plans: list[SavePlan] = distributed.gathered(planner.create_local_plan(), group)
    final, _ = planner.create_global_plan(plans)
    found = []
    for item in planner.finish_plan(final[rank]).items:
        assert item.tensor_data is not None
        found.append(Part(item.index.fqn, tuple(item.tensor_data.chunk.offsets)))
    return found
