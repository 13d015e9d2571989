"""The full state of a model that is spread over ranks, collected on rank 0 tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from stoker import distributed
from stoker.engine.mesh import Mesh
from stoker.engine.step import Step

Tensors = dict[str, torch.Tensor]


def state_dict(step: Step, mesh: Mesh, wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
    """Parameters and saved buffers by name, on the CPU of rank 0; empty on other ranks. All ranks call it.

    Args:
        wanted: whether to include a tensor of this name; the same on every rank.
    """
    saved = step.model.state_dict(keep_vars=True)
    named = [*step.model.named_parameters(), *step.model.named_buffers()]
    held = {}
    for name, tensor in named:
        if name in saved and wanted(name):
            whole = step.whole(tensor)
            if mesh.data.rank == 0:  # the others only help to gather it
                held[name] = whole.cpu().clone()
    return _from_stages(held, mesh) if mesh.size("stage") > 1 else held


def _from_stages(held: Tensors, mesh: Mesh) -> Tensors:
    """Collect on rank 0 what the stages of the first pipeline hold."""
    group = mesh.group("stage")
    names: list[list[str]] = [[] for _ in range(mesh.size("stage"))]
    dist.all_gather_object(names, list(held), group=group)
    if mesh.data.rank > 0:
        return {}
    found = dict(held)
    for stage in range(1, mesh.size("stage")):
        for name in names[stage]:
            if mesh.stage == stage:
                distributed.send(held[name].to(mesh.device), 0, group)
            elif mesh.stage == 0:
                source = dist.get_global_rank(group, stage)
                found[name] = distributed.receive(source, mesh.device, group).cpu()
    return found if mesh.world.rank == 0 else {}
