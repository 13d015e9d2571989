"""Parallelism as functions: a model goes in, laid out over a mesh it comes out as a step.

`lay_out` applies them in visible order: activation checkpointing, compilation, then the strategy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import psutil
import torch
from stoker import distributed
from stoker.engine import activation, blocks
from stoker.engine.mesh import Mesh
from stoker.engine.options import Training
from stoker.engine.precision import DTYPES
from stoker.engine.step import OptimizerFactory, PlainStep, Setting, Step, build_optimizers, trainable
from stoker.world import World
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger("stoker")

Factories = OptimizerFactory | Mapping[str, OptimizerFactory]
Blocks = Sequence[tuple[str, nn.Module]]

_ROOM = 0.6  # of a device's memory for weights, gradients and optimizer state; the rest is activations


def choose(model: nn.Module, training: Training, world: World, device: torch.device) -> tuple[str, str]:
    """The strategy and why: as set, or for `auto` by the number of ranks, the model's size and memory."""
    if training.parallel != "auto":
        return training.parallel, "as set"
    if world.size == 1:
        return "single", "there is one process"
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = weights + trained * (4 + 8)  # gradients, and two moments in float32
    memory = _memory_a_rank(device, world.local_size)
    said = f"weights, gradients and two moments take {_size(needed)} of a rank's {_size(memory)}"
    if needed <= _ROOM * memory and training.fsdp.shard is None:
        return "ddp", f"{said}: each rank can hold all of them"
    return "fsdp", said if needed > _ROOM * memory else "fsdp.shard is set"


def lay_out(model: nn.Module, strategy: str, training: Training, setting: Setting, make: Factories) -> Step:
    """Lay a model out over the mesh and build its optimizers.

    Raises:
        BadInput: the model cannot be laid out so.
    """
    found = blocks.find(model, training.blocks)
    _prepare(model, strategy, training, setting.mesh)
    activation.apply(found, training.activation_checkpointing)
    if training.compile:
        compile_blocks(model, found)
    distributed.copy_from_rank_zero(model)
    return _STRATEGIES[strategy](model, found, training, setting, make)


def single(model: nn.Module, found: Blocks, training: Training, setting: Setting, make: Factories) -> Step:
    """One process has it all."""
    return PlainStep(setting, model, build_optimizers(model, make))


def ddp(model: nn.Module, found: Blocks, training: Training, setting: Setting, make: Factories) -> Step:
    """Every rank has the whole model; gradients are averaged while the backward pass goes on."""
    called = data_parallel(model, training, setting.mesh)
    return PlainStep(setting, model, build_optimizers(model, make), called=called)


def fsdp(model: nn.Module, found: Blocks, training: Training, setting: Setting, make: Factories) -> Step:
    """Parameters, gradients and optimizer state are sharded; a block is gathered while it is used."""
    roots = [model.get_submodule(name) for name in make] if isinstance(make, Mapping) else []
    casts = shard(model, found, training, setting, roots)
    return PlainStep(setting, model, build_optimizers(model, make), casts=casts)


def pipeline(model: nn.Module, found: Blocks, training: Training, setting: Setting, make: Factories) -> Step:
    """Blocks are cut into stages, a rank each; micro-batches stream through them."""
    from stoker.engine.pipeline import PipelineStep

    return PipelineStep(model, training, setting, make)


def deepspeed(model: nn.Module, found: Blocks, training: Training, setting: Setting, make: Factories) -> Step:
    """DeepSpeed's ZeRO."""
    from stoker.engine.zero import DeepSpeedStep

    return DeepSpeedStep(model, training, setting, make)


_STRATEGIES: dict[str, Callable[[nn.Module, Blocks, Training, Setting, Factories], Step]] = {
    "single": single, "ddp": ddp, "fsdp": fsdp, "pipeline": pipeline, "deepspeed": deepspeed,
}  # fmt: skip


def data_parallel(model: nn.Module, training: Training, mesh: Mesh) -> DistributedDataParallel:
    """DDP over the ranks that hold copies of the model."""
    options = training.ddp
    return DistributedDataParallel(
        model,
        process_group=mesh.group("replicate"),
        bucket_cap_mb=options.bucket_mb,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        static_graph=options.static_graph,
        find_unused_parameters=options.find_unused_parameters,
        forward_sync_buffers=False,  # BatchNorm's statistics are averaged with every update
        init_sync=False,  # copied from rank 0 already
    )


def shard(
    model: nn.Module, found: Blocks, training: Training, setting: Setting, roots: Sequence[nn.Module] = ()
) -> bool:
    """FSDP2 by block, then the rest of each root (by default of the model). Whether it casts by itself."""
    mesh = setting.mesh
    # BatchNorm wants its parameters and statistics in one dtype: there autocast does the casting.
    casts = setting.precision != "fp32" and not any(_is_batch_norm(m) for m in model.modules())
    dtype = DTYPES[setting.precision] if casts else None
    options: dict[str, Any] = {
        "mesh": mesh.data_axes,
        "reshard_after_forward": training.fsdp.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if training.fsdp.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for _, block in found:
        fully_shard(block, **options)
    if training.fsdp.reshard_after_forward:
        options["reshard_after_forward"] = None  # torch's default: what the backward pass begins with stays
    for root in [*roots, model]:
        fully_shard(root, **options)
        root.register_forward_hook(_shard_again)
        if hasattr(root, "generate"):  # calls what is inside of it, past the hooks of the root
            register_fsdp_forward_method(root, "generate")
    return casts


def _shard_again(root: nn.Module, inputs: Any, output: Any) -> None:
    """Without a backward pass to come, which shards it: parameters are read and written as shards."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, root).reshard()


def compile_blocks(model: nn.Module, found: Blocks) -> None:
    """Compile each block by itself: all of one class share one compilation. Without blocks, the model."""
    for module in [block for _, block in found] or [model]:
        module.compile()


def _prepare(model: nn.Module, strategy: str, training: Training, mesh: Mesh) -> None:
    """Weights onto the device (a pipeline moves its own stages), memory layout, BatchNorm."""
    if training.channels_last and strategy in ("single", "ddp"):  # shards are contiguous: inputs decide then
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training.sync_batchnorm and mesh.data.size > 1:
        group = mesh.data_axes.get_group() if mesh.data_axes.ndim == 1 else None
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]
    if any(p.requires_grad and p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        for p in trainable(model):
            p.data = p.data.float()  # master weights: an update may be far below one step of bf16
    if strategy != "pipeline":
        model.to(mesh.device)


def warn_of_batch_norm(model: nn.Module, *, share: int, training: Training) -> None:
    """BatchNorm sees micro-batches, not the global batch: say so where that makes a difference.

    Args:
        share: samples of a global batch that are this rank's.
    """
    if training.sync_batchnorm or not any(_is_batch_norm(m) for m in model.modules()):
        return
    micro = share if training.micro_batch in (None, "auto") else min(share, int(training.micro_batch))
    if micro < share or micro < _FEW:
        log.warning(
            "BatchNorm takes its statistics from micro-batches of %d samples, not from the global batch: "
            "the result depends on micro_batch and on the number of ranks",
            micro,
        )


_FEW = 16


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _memory_a_rank(device: torch.device, ranks: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total // ranks)


def _size(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
