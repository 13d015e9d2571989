"""The hyperparameters of an optimizer, saved as JSON and restored."""

from __future__ import annotations

import math

import orjson
import pytest
import torch
from stoker.checkpoint import state
from stoker.world import World
from torch import nn


def _continued(before: torch.optim.Optimizer, now: torch.optim.Optimizer, built: state.Groups) -> None:
    """Restore the groups of `before`, which was created with `built`, into another process's optimizer."""
    names = [[f"{number}" for number, _ in enumerate(group["params"])] for group in before.param_groups]
    saved = [{**group, "params": n} for group, n in zip(state.hyperparameters(before), names, strict=True)]
    then, groups = orjson.loads(orjson.dumps([built, saved]))
    state.restore_groups(now, names, groups, state.hyperparameters(now)[: len(built)], then, World())


def test_a_rate_that_is_a_tensor_stays_one_when_the_user_changes_it() -> None:
    """As torchao's optimizers demand, whose steps are compiled."""
    torchao = pytest.importorskip("torchao.optim")
    before, now = (torchao.AdamW8bit(nn.Linear(64, 64).parameters(), lr=lr) for lr in (0.1, 0.05))
    built = state.hyperparameters(before)
    before.param_groups[0]["lr"].fill_(0.02)  # by a schedule
    _continued(before, now, built)
    (group,) = now.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert group["lr"].item() == pytest.approx(0.05)
    assert isinstance(group["betas"], tuple)


def test_an_infinite_bound_is_restored_and_so_is_what_replaced_it() -> None:
    """As `growth_rate` of Prodigy and D-Adaptation."""

    def bounded() -> torch.optim.Optimizer:
        made = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        made.param_groups[0]["growth_rate"] = math.inf
        return made

    before, now = bounded(), bounded()
    built = state.hyperparameters(before)
    before.param_groups[0]["growth_rate"] = 1.02
    for optimizer in (before, now):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    before.param_groups[1]["growth_rate"] = math.inf
    _continued(before, now, built)
    assert [group["growth_rate"] for group in now.param_groups] == [1.02, math.inf]
