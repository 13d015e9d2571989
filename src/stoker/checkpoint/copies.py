"""Checks that ranks holding copies of the same parameters have the same values: a checkpoint stores only one.

If trained parameters diverge, the cause is a mistake: a loop that calls `loss.backward()` and
`optimizer.step()` itself, so that gradients are not reduced over ranks, or weights that are drawn with random
numbers, which differ between ranks. Buffers and frozen parameters diverge if each rank changes them by its
own batches, which is said. The check compares evenly spaced values, which takes a few milliseconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence

import torch
import xxhash
from stoker import distributed
from stoker.checkpoint import frozen
from stoker.errors import StokerError
from stoker.words import some
from stoker.world import World

log = logging.getLogger("stoker")

_ROUNDING = 1e-4  # of a parameter's largest value: the differences between unlike devices are far below this
_TOO_FAR = 1e-2
_PROBED = 64  # values per parameter
_NAMED = 5  # names in a message

_Apart = tuple[float, str, int, int]
"""By how much a tensor differs, its name, and the two ranks."""

_said: set[str] = set()
"""The buffers and frozen parameters that were warned of."""


def check(
    trained: Mapping[str, torch.Tensor],
    frozen_ones: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    *,
    part: Hashable,
    whole: Hashable,
    step: int,
    world: World,
) -> None:
    """Raises StokerError if trained parameters have diverged between ranks; warns if others have.

    All ranks call it.

    Args:
        trained, frozen_ones, buffers: what this rank saves of the model; of frozen parameters, those that
            have changed.
        part: which part of the parameters this rank holds, equal for ranks that hold copies.
        whole: the same for buffers, which are not sharded.
    """
    if world.size == 1:
        return
    groups = ((trained, part, _answer), (frozen_ones, part, _tell), (buffers, whole, _tell))
    probes = [_probes(tensors) for tensors, _, _ in groups]
    of_ranks = distributed.gathered(
        [(of, _sum(found)) for (_, of, _), found in zip(groups, probes, strict=True)]
    )
    for number, (_, _, answer) in enumerate(groups):
        firsts = {held[number][0]: rank for rank, held in reversed(list(enumerate(of_ranks)))}
        pairs = [(firsts[held[number][0]], rank) for rank, held in enumerate(of_ranks)]
        others = [(a, b) for a, b in pairs if of_ranks[a][number] != of_ranks[b][number]]
        if others:
            values = distributed.gathered(probes[number])
            apart = [
                (_apart(values[first].get(name), values[rank].get(name)), name, first, rank)
                for first, rank in others
                for name in values[first].keys() | values[rank].keys()
            ]
            answer(step, sorted(apart, reverse=True), world)


def _answer(step: int, apart: Sequence[_Apart], world: World) -> None:
    """Raises StokerError if trained parameters have diverged by more than rounding."""
    share, name, first, rank = apart[0]
    said = f"{name} differs between ranks {first} and {rank}, which hold copies, by {share:.2%} of its size"
    if share > _TOO_FAR:
        raise StokerError(
            f"step {step}: {said}, so no checkpoint is saved. In your own loop, use "
            "trainer.backward(loss_sum, weight) and trainer.update() instead of loss.backward() and "
            "optimizer.step(), so that gradients are summed over ranks. If you change weights by hand, "
            "change them identically on all ranks; random numbers differ between ranks"
        )
    if share > _ROUNDING and world.rank == 0:
        log.warning("step %d: %s", step, said)


def _tell(step: int, apart: Sequence[_Apart], world: World) -> None:
    """Warn once of what ranks hold differently besides trained parameters."""
    names = {name for share, name, _, _ in apart if share > _ROUNDING} - _said
    _said.update(names)
    if names and world.rank == 0:
        log.warning(
            "step %d: ranks have changed buffers or frozen weights differently (%s), and a checkpoint has "
            "those of one rank: a resumed run goes on from other values. Reduce what each rank computes of "
            "its own batches, as with torch.distributed.all_reduce, before it changes them",
            step, some(sorted(names), _NAMED),
        )  # fmt: skip


def _probes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: frozen.own(tensor) for name, tensor in tensors.items()}
    return {name: _probe(values).float().cpu() for name, values in found.items() if values is not None}


def _sum(probes: Mapping[str, torch.Tensor]) -> str:
    return xxhash.xxh3_128_hexdigest(torch.cat(list(probes.values())).numpy().data) if probes else ""


def _probe(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBED)][: _PROBED + 1]


def _apart(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """The largest difference between two ranks' values of a tensor, as a share of its largest value."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.inf
    differs = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if not differs.any():
        return 0.0
    both = torch.stack([ours, theirs])
    largest = both[both.isfinite()].abs().amax().item() if both.isfinite().any() else 0.0
    share = (ours - theirs)[differs].abs().max().item() / largest if largest else math.inf
    return math.inf if math.isnan(share) else share
