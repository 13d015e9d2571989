"""Checks that ranks holding copies of the same parameters have the same values: a checkpoint stores only one.

If they diverge, the cause is a mistake: a loop that calls `loss.backward()` and `optimizer.step()` itself,
so that gradients are not reduced over ranks, or weights that are drawn with random numbers, which differ
between ranks. The check compares evenly spaced values, which takes a few milliseconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence

import torch
import xxhash
from stoker import distributed
from stoker.checkpoint import frozen
from stoker.errors import StokerError
from stoker.world import World
from torch import nn

log = logging.getLogger("stoker")

Held = tuple[Hashable, str]
"""The part of the model that a rank holds, equal for ranks with the same part; and a checksum of its
values."""

_ROUNDING = 1e-4  # of a parameter's largest value: the differences between unlike devices are far below this
_APART = 1e-2
_PROBED = 64  # values per parameter


def held(model: nn.Module, part: Hashable) -> Held:
    """The part that this rank holds of a model, with its checksum."""
    values = list(_probes(model).values())
    return part, xxhash.xxh3_128_hexdigest(torch.cat(values).numpy().data) if values else ""


def check(model: nn.Module, of_ranks: Sequence[Held], step: int) -> None:
    """Raises StokerError if ranks have diverged. All ranks call it, with what all of them hold."""
    firsts = {part: rank for rank, (part, _) in reversed(list(enumerate(of_ranks)))}
    pairs = [(firsts[part], rank) for rank, (part, _) in enumerate(of_ranks)]
    others = [(first, rank) for first, rank in pairs if of_ranks[first] != of_ranks[rank]]
    if not others:
        return
    values = distributed.gathered(_probes(model))
    share, name, first, rank = max(
        (_apart(ours, values[rank][name]), name, first, rank)
        for first, rank in others
        for name, ours in values[first].items()
    )
    said = f"{name} differs between ranks {first} and {rank}, which hold copies, by {share:.2%} of its size"
    if share > _APART:
        raise StokerError(
            f"step {step}: {said}, so no checkpoint is saved. In your own loop, use "
            "trainer.backward(loss_sum, weight) and trainer.update() instead of loss.backward() and "
            "optimizer.step(), so that gradients are summed over ranks. If you change weights by hand, "
            "change them identically on all ranks; random numbers differ between ranks"
        )
    if share > _ROUNDING and World.current().rank == 0:
        log.warning("step %d: %s", step, said)


def _probes(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: frozen.held(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: _probe(values).float().cpu() for name, values in found.items() if values is not None}


def _probe(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBED)][: _PROBED + 1]


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference between two ranks' values of a parameter, as a share of its largest value."""
    largest = max(ours.abs().max().item(), theirs.abs().max().item()) if ours.numel() else 0.0
    share = (ours - theirs).abs().max().item() / largest if largest else 0.0
    return math.inf if math.isnan(share) else share
