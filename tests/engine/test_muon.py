"""Muon, against torch's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from stoker import distributed
from stoker.engine import optimizers
from stoker.engine.muon import newton_schulz, orthogonal
from stoker.world import World
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ranks

SHAPES = [(24, 16), (16, 40), (16, 16)]


def test_a_stack_is_one_matrix_after_the_other() -> None:
    stack = torch.randn(3, 8, 20)
    assert torch.equal(newton_schulz(stack), torch.stack([newton_schulz(matrix) for matrix in stack]))
    assert newton_schulz(torch.zeros(2, 4, 3)).abs().max() == 0, "nor is nothing divided by nothing"
    assert newton_schulz(torch.randn(0, 4, 3)).shape == (0, 4, 3)


def test_matrices_take_the_steps_of_torchs_muon_and_the_rest_those_of_adamw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours iterates in float32 on a CPU, and so does torch's for once."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (16,), (30, 16)]]

    ours, theirs = parameters(), parameters()
    table = ours[-1]
    make = optimizers.factory(
        "muon", lr=0.1, weight_decay=0.3, betas=(0.9, 0.95), decay_all=True,
        hidden=lambda: [p for p in ours if p is not table],
    )  # fmt: skip
    made = make(ours)
    muon = torch.optim.Muon(theirs[:3], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=0.1, weight_decay=0.3, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * 10.0**-step
            other.grad = mine.grad.clone()
        for optimizer in (made, muon, adamw):
            optimizer.step()
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, ours[3:], theirs[3:]))
    assert [sorted(made.state[p]) for p in (ours[0], table)] == [
        ["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"],
    ]  # fmt: skip


def of_shards(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """How far off the results are, of matrices of which a rank has some rows or none, and of a stack."""
    distributed.join(World.current(), "gloo")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
    torch.manual_seed(0)
    whole = [torch.randn(size) for size in ((5, 8), (2, 3, 4), (1, 6))]
    made = orthogonal([distribute_tensor(matrix, mesh, placements) for matrix in whole])
    assert all(m.placements == tuple(placements) for m in made)
    return [full - newton_schulz(of) for full, of in zip([m.full_tensor() for m in made], whole, strict=True)]


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_of_shards_it_is_that_of_the_whole(shape: tuple[int, ...], tmp_path: Path) -> None:
    for differences in ranks.run(of_shards, math.prod(shape), tmp_path, shape):
        assert max(difference.abs().max() for difference in differences) < 1e-6
