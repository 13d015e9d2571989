"""What ranks do together outside of steps: real processes, with gloo between them."""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stoker import distributed
from stoker.world import World

import ranks
from support import LONG

_LIMIT = 1.0  # s, of the group that steps use


def prepare(slow: int) -> None:
    """Have one rank take longer over its part than a step may."""
    world = World.current()
    distributed.join(world)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=_LIMIT))
    with distributed.rank_zero_first(world):
        if world.rank == slow:
            time.sleep(2 * _LIMIT)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LONG))
    dist.barrier()


def lose_rank_zero() -> str:
    """Kill rank 0 while the other waits for it; what that one is told."""
    world = World.current()
    distributed.join(world)
    try:
        with distributed.rank_zero_first(world):
            os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        return str(error)
    return ""


def copy_a_graph() -> list[torch.Tensor]:
    """A model's weights, and its buffers of odd layouts, once they are rank 0's; ranks begin with others."""
    world = World.current()
    distributed.join(world)
    model = torch.nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(3 + 2 * world.rank)[:3, :3].roll(world.rank).to_sparse())
    model.register_buffer("rows", torch.eye(3 + 2 * world.rank).to_sparse_csr())
    model.register_buffer("every_second", torch.arange(8.0)[world.rank :: 2])
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t() + world.rank)
    model.register_buffer("repeated", torch.arange(2.0 * world.rank, 2.0 * world.rank + 2).expand(3, 2))
    distributed.copy_from_rank_zero(model)
    return [tensor.detach().to_dense() for tensor in [*model.parameters(), *model.buffers()]]


def test_ranks_begin_with_what_rank_zero_has_whatever_its_layout(tmp_path: Path) -> None:
    first, second = ranks.run(copy_a_graph, 2, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(first[2], torch.eye(3))
    assert torch.equal(first[3], torch.eye(3))
    assert torch.equal(first[4], torch.arange(8.0)[::2])
    assert torch.equal(first[6], torch.arange(2.0).expand(3, 2))


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_wait_for_one_that_takes_longer_than_a_step_may(slow: int, tmp_path: Path) -> None:
    assert ranks.run(prepare, 2, tmp_path, slow) == [None, None]


def test_a_rank_that_waits_for_rank_zero_ends_when_that_is_killed(tmp_path: Path) -> None:
    died, told = ranks.run(lose_rank_zero, 2, tmp_path)
    assert died is None
    assert "onnection" in told
