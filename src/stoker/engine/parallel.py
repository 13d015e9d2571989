"""A model over the data ranks: each has a copy of it (DDP), or a part of every weight (FSDP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from stoker.engine import blocks
from stoker.engine.mesh import Mesh
from stoker.engine.precision import DTYPES
from stoker.engine.settings import Training
from stoker.engine.step import Blocks, Setting
from stoker.errors import BadInput
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel


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
        init_sync=False,  # already copied from rank 0
    )


def shard(
    model: nn.Module, found: Blocks, training: Training, setting: Setting, roots: Sequence[nn.Module] = ()
) -> bool:
    """FSDP2 by block, then the rest of each root (default: the model). Returns whether FSDP casts."""
    mesh = setting.mesh
    check_real(model, "FSDP")
    scalars = {name: p for name, p in model.named_parameters() if not p.dim()}
    _refuse_trained(scalars)
    # BatchNorm needs its parameters and statistics in one dtype: then autocast does the casting.
    casts = setting.precision != "fp32" and not blocks.has_batch_norm(model)
    dtype = DTYPES[setting.precision] if casts else None
    options: dict[str, Any] = {
        "mesh": mesh.data_axes,
        "reshard_after_forward": training.fsdp.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "ignored_params": set(scalars.values()),
    }
    if training.fsdp.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for _, block in found:
        fully_shard(block, **options)
    if training.fsdp.reshard_after_forward:
        options["reshard_after_forward"] = None  # torch's default: keep what the backward pass starts with
    if scalars:  # they may be unfrozen on the way
        model.register_forward_pre_hook(lambda *_: _refuse_trained(scalars))
    for root in [*roots, model]:
        fully_shard(root, **options)
        root.register_forward_hook(_shard_again)
        if hasattr(root, "generate"):  # it calls inner modules, bypassing the root's hooks
            register_fsdp_forward_method(root, "generate")
    return casts


def check_real(model: nn.Module, by: str) -> None:
    """Raises BadInput if a weight is complex: sums in float32 would keep only its real part."""
    found = [name for name, p in model.named_parameters() if p.is_complex()]
    if found:
        raise BadInput(f"{found[0]} is complex, but {by} needs real weights: use parallel=single or ddp")


def _refuse_trained(scalars: Mapping[str, nn.Parameter]) -> None:
    """Raises BadInput if one is trained: FSDP divides the first dim of every weight."""
    found = next((name for name, scalar in scalars.items() if scalar.requires_grad), None)
    if found is not None:
        raise BadInput(
            f"{found} is a scalar, which FSDP cannot divide among ranks: give it the shape (1,), freeze it "
            "with requires_grad_(False), or use parallel=ddp or deepspeed"
        )


def _shard_again(root: nn.Module, inputs: Any, output: Any) -> None:
    """Without a backward pass to reshard them, reshard here: parameters are read and written as shards."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, root).reshard()


def gather_no_more(model: nn.Module) -> None:
    """Free what FSDP keeps gathered, for example after a generation: parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
