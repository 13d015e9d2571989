"""Parallelism as functions: a model goes in, and comes out as a step, laid out over a mesh.

`lay_out` applies them in visible order: activation checkpointing, compilation, then the strategy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from stoker import distributed, words
from stoker.engine import activation, blocks, device, memory, precision
from stoker.engine.mesh import Mesh
from stoker.engine.parallel import check_real, data_parallel, shard
from stoker.engine.replicas import Replicas
from stoker.engine.settings import Training
from stoker.engine.step import Blocks, Load, OptimizerFactory, PlainStep, Setting, Step, build_optimizers
from stoker.errors import BadInput
from stoker.world import World
from torch import nn

log = logging.getLogger("stoker")

Factories = OptimizerFactory | Mapping[str, OptimizerFactory]

_ROOM = 0.6  # of a device's memory for weights, gradients and optimizer state; the rest is for activations


def choose(model: nn.Module, training: Training, world: World, on: torch.device) -> tuple[str, str]:
    """The strategy and the reason: as set, or for `auto` by number of ranks, model size and memory."""
    if training.parallel != "auto":
        return training.parallel, "as set"
    if world.size == 1:
        return "single", "there is only one process"
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = weights + trained * (4 + 8)  # gradients, and two moments in float32
    has = memory.of_a_rank(on, world)
    said = f"weights, gradients and two moments need {words.size(needed)} of a rank's {words.size(has)}"
    if needed <= _ROOM * has and training.fsdp.shard is None:
        return "ddp", f"{said}: each rank can hold the whole model"
    return "fsdp", said if needed > _ROOM * has else "fsdp.shard is set"


def lay_out(
    model: nn.Module,
    strategy: str,
    training: Training,
    setting: Setting,
    make: Factories,
    load: Load = lambda model, device, prefix: None,
) -> Step:
    """Lay a model out over the mesh, load what is on the meta device, and build its optimizers.

    Raises:
        BadInput: the model cannot be laid out like this, or does not fit into a rank's memory.
    """
    found = blocks.find(model, training.blocks)
    _prepare(model, strategy, training, setting.mesh)
    planned = setting.mesh.world.planned > 0
    if any(p.is_meta for p in model.parameters()) and not planned:
        memory.check_fits(model, found, strategy, training, setting.mesh, _moments(make, setting.mesh.device))
    activation.apply(found, training.activation_checkpointing)
    if training.compile and not planned:
        compile_blocks(model, found)
    distributed.copy_from_rank_zero(model)
    return _STRATEGIES[strategy](Layout(model, found, training, setting, make, load))


def _moments(make: Factories, on: torch.device) -> float:
    """Bytes that an optimizer will keep per weight; an 8-bit one compiles its step, for that device."""
    if isinstance(make, Mapping):
        return memory.MOMENTS
    small = nn.Parameter(torch.zeros(256, 256, device=on))
    return memory.kept_per_weight(make([small]), small)


@dataclass(frozen=True)
class Layout:
    """The arguments of a strategy."""

    model: nn.Module
    blocks: Blocks
    training: Training
    setting: Setting
    make: Factories
    load: Load


def single(given: Layout) -> Step:
    """One process holds everything."""
    given.load(given.model, given.setting.mesh.device, "")
    optimizers = build_optimizers(given.model, given.make)
    return PlainStep(given.setting, given.model, optimizers, in_backward=given.training.optimizer_in_backward)


def ddp(given: Layout) -> Step:
    """Every rank holds the whole model; gradients are averaged during the backward pass."""
    given.load(given.model, given.setting.mesh.device, "")
    mesh = given.setting.mesh
    build = functools.partial(data_parallel, given.model, given.training, mesh)
    # With imaginary ranks nothing is reduced; gradients are in buckets even so.
    replicas = None if mesh.world.planned else Replicas(given.model, build, mesh.group("replicate"))
    return PlainStep(given.setting, given.model, build_optimizers(given.model, given.make), replicas=replicas)


def fsdp(given: Layout) -> Step:
    """Parameters, gradients and optimizer state are sharded; a block is gathered while it is used."""
    model, make = given.model, given.make
    roots = [model.get_submodule(name) for name in make] if isinstance(make, Mapping) else []
    casts = shard(model, given.blocks, given.training, given.setting, roots)
    on, offload = given.setting.mesh.device, given.training.fsdp.offload
    given.load(model, torch.device("cpu") if offload else on, "")
    for buffer in model.buffers() if offload else ():
        buffer.data = buffer.data.to(on)
    return PlainStep(given.setting, model, build_optimizers(model, make), casts=casts)


def pipeline(given: Layout) -> Step:
    """Blocks are split into stages, one per rank; micro-batches stream through them."""
    from stoker.engine.pipeline import PipelineStep

    return PipelineStep(given.model, given.training, given.setting, given.make, given.load)


def deepspeed(given: Layout) -> Step:
    """DeepSpeed's ZeRO."""
    from stoker.engine.zero import DeepSpeedStep, Originals, check_file, partition

    check_real(given.model, "DeepSpeed")
    check_file(given.training, given.setting, given.model)
    originals: Originals = {}
    if given.training.deepspeed.stage == 3:
        partition(given.model, given.blocks, given.training, given.setting, given.load, originals)
    given.load(given.model, given.setting.mesh.device, "")
    return DeepSpeedStep(given.model, given.training, given.setting, given.make, originals)


_STRATEGIES: dict[str, Callable[[Layout], Step]] = {
    "single": single, "ddp": ddp, "fsdp": fsdp, "pipeline": pipeline, "deepspeed": deepspeed,
}  # fmt: skip


def compile_blocks(model: nn.Module, found: Blocks) -> None:
    """Compile each block separately: blocks of one class share a compilation. Without blocks, the model."""
    for module in [block for _, block in found] or [model]:
        module.compile()


def _prepare(model: nn.Module, strategy: str, training: Training, mesh: Mesh) -> None:
    """Move weights to the device (a pipeline moves its own stages); set memory layout and BatchNorm."""
    if training.channels_last and strategy in ("single", "ddp"):  # for contiguous shards, inputs decide
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training.sync_batchnorm and mesh.data.size > 1:
        group = mesh.data_axes.get_group() if mesh.data_axes.ndim == 1 else None
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        if p.requires_grad and precision.wide(p.dtype) != p.dtype:
            # Master weights: an update can be far below the resolution of bf16.
            p.data = p.data.to(precision.wide(p.dtype))
        if p.requires_grad and p.dtype == torch.complex128:  # not supported by safetensors
            raise BadInput(f"{name} is complex128, which checkpoints do not support: use complex64")
    if strategy != "pipeline":
        device.move(model, mesh.device)


def warn_of_batch_norm(model: nn.Module, *, batch_size: int, share: int, training: Training) -> None:
    """Warn if BatchNorm sees micro-batches that differ from the global batch.

    Args:
        batch_size: samples of a global batch.
        share: those of them that this rank processes.
    """
    if training.sync_batchnorm or not blocks.has_batch_norm(model):
        return
    micro = share if training.micro_batch in (None, "auto") else min(share, int(training.micro_batch))
    if micro < share or micro < min(batch_size, _FEW):
        log.warning(
            "BatchNorm computes its statistics on micro-batches of %d samples, not on the global batch: "
            "the result depends on micro_batch and on the number of ranks",
            micro,
        )


_FEW = 16
