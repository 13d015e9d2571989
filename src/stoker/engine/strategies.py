"""Parallelism as functions: a model goes in, laid out over a mesh it comes out as a step.

`lay_out` applies them in visible order: activation checkpointing, compilation, then the strategy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from stoker import distributed, words
from stoker.engine import activation, blocks, device, memory, options, precision
from stoker.engine.mesh import Mesh
from stoker.engine.options import Training
from stoker.engine.precision import DTYPES
from stoker.engine.step import OptimizerFactory, PlainStep, Setting, Step, build_optimizers
from stoker.errors import BadInput
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
Load = Callable[[nn.Module, torch.device, str], None]
"""Gives memory and values to what of a model is on the meta device, below a dotted prefix (all: "")."""
Blocks = Sequence[tuple[str, nn.Module]]

_ROOM = 0.6  # of a device's memory for weights, gradients and optimizer state; the rest is activations


def choose(model: nn.Module, training: Training, world: World, on: torch.device) -> tuple[str, str]:
    """The strategy and why: as set, or for `auto` by the number of ranks, the model's size and memory."""
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
    """Lay a model out over the mesh, have it filled where it is on the meta device, build its optimizers.

    Raises:
        BadInput: the model cannot be laid out so, or what is to be loaded is more than a rank can hold.
    """
    found = blocks.find(model, training.blocks)
    _prepare(model, strategy, training, setting.mesh)
    planned = setting.mesh.world.planned > 0
    if any(p.is_meta for p in model.parameters()) and not planned:
        memory.check_fits(model, found, strategy, training, setting.mesh, _moments(make))
    activation.apply(found, training.activation_checkpointing)
    if training.compile and not planned:
        compile_blocks(model, found)
    distributed.copy_from_rank_zero(model)
    return _STRATEGIES[strategy](Layout(model, found, training, setting, make, load))


def _moments(make: Factories) -> float:
    """Bytes that an optimizer will keep for each weight, as one for a small parameter does."""
    if isinstance(make, Mapping):
        return memory.MOMENTS
    small = nn.Parameter(torch.zeros(256, 256))
    small.grad = torch.zeros_like(small)
    optimizer = make([small])
    optimizer.step()
    kept = (t for t in optimizer.state[small].values() if isinstance(t, torch.Tensor))
    return memory.held(kept) / small.numel()


@dataclass(frozen=True)
class Layout:
    """What a strategy is given."""

    model: nn.Module
    blocks: Blocks
    training: Training
    setting: Setting
    make: Factories
    load: Load


def single(given: Layout) -> Step:
    """One process has it all."""
    given.load(given.model, given.setting.mesh.device, "")
    optimizers = build_optimizers(given.model, given.make)
    return PlainStep(given.setting, given.model, optimizers, in_backward=given.training.optimizer_in_backward)


def ddp(given: Layout) -> Step:
    """Every rank has the whole model; gradients are averaged while the backward pass goes on."""
    given.load(given.model, given.setting.mesh.device, "")
    mesh = given.setting.mesh
    # Of ranks that are not there nothing is reduced; gradients live in the buckets as they do without.
    called = given.model if mesh.world.planned else data_parallel(given.model, given.training, mesh)
    return PlainStep(given.setting, given.model, build_optimizers(given.model, given.make), called=called)


def fsdp(given: Layout) -> Step:
    """Parameters, gradients and optimizer state are sharded; a block is gathered while it is used."""
    model, make = given.model, given.make
    roots = [model.get_submodule(name) for name in make] if isinstance(make, Mapping) else []
    casts = shard(model, given.blocks, given.training, given.setting, roots)
    given.load(model, torch.device("cpu") if given.training.fsdp.offload else given.setting.mesh.device, "")
    return PlainStep(given.setting, model, build_optimizers(model, make), casts=casts)


def pipeline(given: Layout) -> Step:
    """Blocks are cut into stages, a rank each; micro-batches stream through them."""
    from stoker.engine.pipeline import PipelineStep

    return PipelineStep(given.model, given.training, given.setting, given.make, given.load)


def deepspeed(given: Layout) -> Step:
    """DeepSpeed's ZeRO."""
    from stoker.engine.zero import DeepSpeedStep, partition

    _check_real(given.model, "DeepSpeed")
    if options.zero_stage(given.training.deepspeed) == 3:
        partition(given.model, given.blocks, given.training, given.setting, given.load)
    given.load(given.model, given.setting.mesh.device, "")
    return DeepSpeedStep(given.model, given.training, given.setting, given.make)


_STRATEGIES: dict[str, Callable[[Layout], Step]] = {
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
    _check_real(model, "FSDP")
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


def _check_real(model: nn.Module, by: str) -> None:
    """Raises BadInput where a weight is complex: of sums in float32 there are the real parts alone."""
    found = [name for name, p in model.named_parameters() if p.is_complex()]
    if found:
        raise BadInput(f"{found[0]} is complex, but {by} needs real weights: use parallel=single or ddp")


def _shard_again(root: nn.Module, inputs: Any, output: Any) -> None:
    """Without a backward pass to come, which shards it: parameters are read and written as shards."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, root).reshard()


def gather_no_more(model: nn.Module) -> None:
    """Let go of what FSDP has gathered and keeps, as behind a generation: parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
    for name, p in model.named_parameters():
        if p.requires_grad and precision.wide(p.dtype) != p.dtype:
            p.data = p.data.to(
                precision.wide(p.dtype)
            )  # master weights: an update may be far below a step of bf16
        if p.requires_grad and p.dtype == torch.complex128:  # which safetensors has not
            raise BadInput(f"{name} is complex128, which checkpoints do not support: use complex64")
    if strategy != "pipeline":
        device.move(model, mesh.device)


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
            "BatchNorm computes its statistics on micro-batches of %d samples, not on the global batch: "
            "the result depends on micro_batch and on the number of ranks",
            micro,
        )


_FEW = 16


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
