"""The ranks of a run as a mesh, and this process's place in it, as a value that is passed around.

With several ranks, the axes are `replicate` (copies of the model), `shard` (ranks that share one
copy) and `stage` (ranks of one pipeline). A global batch is divided over the first two; all ranks
of one pipeline read the same share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from stoker.engine.device import check_apart
from stoker.engine.settings import Training
from stoker.world import World
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The place of this process among the ranks of a run."""

    world: World
    device: torch.device
    axes: DeviceMesh | None = None
    """replicate, shard, stage; None for a single process."""

    def size(self, axis: str) -> int:
        """The number of ranks along an axis."""
        if self.axes is None:
            return 1
        assert self.axes.mesh_dim_names is not None
        return self.axes.size(self.axes.mesh_dim_names.index(axis))

    def group(self, axis: str) -> Any:
        """This rank's process group along an axis; None for a single process."""
        return None if self.axes is None else self.axes.get_group(axis)

    @property
    def stage(self) -> int:
        """This rank's position in its pipeline."""
        return 0 if self.axes is None else self.axes.get_local_rank("stage")

    @property
    def shard(self) -> int:
        """This rank's position among those that share one copy of the model."""
        return 0 if self.axes is None else self.axes.get_local_rank("shard")

    @functools.cached_property
    def data(self) -> World:
        """The world for data loading: determines which share of a global batch this rank reads."""
        if self.axes is None:
            return self.world
        ranks = self.size("replicate") * self.size("shard")
        place = self.axes.get_local_rank("replicate") * self.size("shard") + self.shard
        return replace(self.world, rank=place, size=ranks)

    @property
    def data_axes(self) -> DeviceMesh:
        """The axes over which gradients are reduced: one, or two with hybrid sharding."""
        assert self.axes is not None
        if self.size("replicate") > 1 and self.size("shard") > 1:
            return self.axes["replicate", "shard"]
        return self.axes["replicate" if self.size("replicate") > 1 else "shard"]


def build(world: World, device: torch.device, training: Training, strategy: str) -> Mesh:
    """The mesh of a strategy; `options.check` has verified that the axes divide the ranks.

    Raises BadInput if two ranks have the same GPU.
    """
    if not dist.is_initialized():
        return Mesh(world, device)
    check_apart(device)
    stages = (training.pipeline.ranks or world.size) if strategy == "pipeline" else 1
    data = world.size // stages
    if strategy == "fsdp":
        shard = training.fsdp.shard or data
    elif strategy == "pipeline" and training.pipeline.data == "fsdp":
        shard = data
    else:
        shard = 1
    # Stages are the outer axis: neighbours on a machine exchange gradients, which is more traffic.
    axes = init_device_mesh(
        device.type, (stages, data // shard, shard), mesh_dim_names=("stage", "replicate", "shard")
    )
    return Mesh(world, device, axes)
