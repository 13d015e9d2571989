"""Models larger than this machine: built on the meta device, laid out over ranks that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from stoker import Training
from stoker.engine import blocks, memory, mesh, parallel
from stoker.engine.loss_scale import LossScale
from stoker.engine.settings import DeepSpeed
from stoker.engine.step import Setting
from stoker.world import World
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import ranks
from support import SOAK

CPU = torch.device("cpu")


def llama_7b() -> Any:
    """Llama 2 7B, of 6,738,415,616 parameters: transformers' default shape."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def shares(world: int) -> list[tuple[int, int, int]]:
    """For each rank of a fake world: bytes of its share, parameters, and how many of those are whole."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        training = Training(parallel="fsdp", precision="fp32")
        placed = mesh.build(World(rank=rank, size=world), CPU, training, "fsdp")
        model = llama_7b()
        setting = Setting(placed, lambda batch: batch, None, "fp32", LossScale(False), None)
        parallel.shard(model, blocks.find(model), training, setting)
        held = [p for p in model.parameters() if isinstance(p, DTensor)]
        whole = len(list(model.parameters())) - len(held)
        whole += sum(p.to_local().numel() == p.numel() for p in held)
        found.append((sum(p.to_local().nbytes for p in held), sum(p.numel() for p in held), whole))
        dist.destroy_process_group()
    return found


@pytest.mark.soak
@pytest.mark.parametrize("world", [4, 8] if SOAK else [4])
def test_7b_is_sharded_whole_and_no_share_exceeds_the_formula(world: int, tmp_path: Any) -> None:
    (found,) = ranks.run(shares, 1, tmp_path, world)
    model = llama_7b()
    training = Training(parallel="fsdp")
    formula = memory.needed(model, blocks.find(model), "fsdp", training, world)
    assert formula.weights == 6_738_415_616 * 4 // world
    assert formula.optimizer == 2 * formula.weights
    for share, parameters, whole in found:
        assert parameters == 6_738_415_616
        assert whole == 0, "some parameter is on every rank"
        assert share <= formula.weights * 1.05


def test_the_estimate_is_what_ranks_hold_in_the_end(tmp_path: Any) -> None:
    """By the formulas of ZeRO (arXiv:2104.04473 for pipelines), in multiples of the weights in float32."""
    model = llama_7b()
    found = blocks.find(model)
    weights = 6_738_415_616 * 4

    def of(strategy: str, ranks: int, stage: int = 2) -> memory.Needed:
        training = Training(parallel=strategy, deepspeed=DeepSpeed(stage=stage))
        return memory.needed(model, found, strategy, training, ranks)

    assert of("single", 1).total == weights * 4
    assert of("ddp", 4).total == weights * 4
    assert of("fsdp", 4).total == pytest.approx(weights + of("fsdp", 4).gathered, rel=1e-6)
    assert of("deepspeed", 4, 1).total == pytest.approx(weights * (2 + 2 / 4), rel=1e-6)
    assert of("deepspeed", 4, 2).total == pytest.approx(weights * (1 + 3 / 4), rel=1e-6)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert of("single", 1).total == weights


def test_a_model_too_large_for_the_machine_is_refused_with_an_estimate() -> None:
    model = llama_7b()
    with pytest.raises(
        memory.TooLarge, match=r"6\.7 billion parameters needs 100\.4 GiB per rank"
    ) as refused:
        memory.check_fits(
            model, blocks.find(model), "single", Training(), mesh.Mesh(World(local_size=8), CPU)
        )
    said = str(refused.value)
    assert "weights 25.1 GiB, gradients 25.1 GiB, optimizer state 50.2 GiB" in said
    assert "with parallel=fsdp" in said
