"""Whether ranks that hold the same parameters hold the same values of them: a checkpoint has one of each.

What parts them is a mistake: a loop that calls `loss.backward()` and `optimizer.step()` by itself, so that no
rank hears of another's gradients, or weights that are drawn anew, by random numbers that are each rank's own.
Looked at are values at even distances, which takes a few milliseconds.
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
"""Which part of the model a rank has, the same for those that have the same; and a checksum of its values."""

_ROUNDING = (
    1e-4  # of a parameter's largest value: what unlike devices make of the same gradients is far below
)
_APART = 1e-2
_PROBED = 64  # values of each parameter


def held(model: nn.Module, part: Hashable) -> Held:
    """What this rank holds of a model."""
    values = list(_probes(model).values())
    return part, xxhash.xxh3_128_hexdigest(torch.cat(values).numpy().data) if values else ""


def check(model: nn.Module, of_ranks: Sequence[Held], step: int) -> None:
    """Raises StokerError where ranks have come apart. All ranks call it, with what all of them hold."""
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
    """How far apart two ranks' values of a parameter are, as a share of the largest of them."""
    largest = max(ours.abs().max().item(), theirs.abs().max().item()) if ours.numel() else 0.0
    share = (ours - theirs).abs().max().item() / largest if largest else 0.0
    return math.inf if math.isnan(share) else share
