"""Measurements made with passes that leave no trace except in memory use."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from stoker import storage
from stoker.engine import batches, device, memory, micro_batch, modes, random_state
from stoker.engine.agreement import Agreement, Requests
from stoker.engine.buffers import Buffers
from stoker.engine.step import Setting, Step
from stoker.tensors import local
from torch import nn


def largest_micro_batch(
    step: Step, setting: Setting, batch: Any, sizes: Sequence[int], about: dict[str, Any]
) -> int:
    """The largest micro-batch that fits, found by trying, and remembered for this model and device.

    During the attempts, the memory that the optimizers will take with their first step is held.

    Args:
        batch: this rank's share of a global batch, on the device.
        sizes: the candidates, smallest first.
        about: what else the memory use depends on.

    Raises:
        StokerError: not even one sample fits.
    """
    about = _about(step, setting, batch, about)
    held = [state_to_come(optimizer) for optimizer in step.optimizers.values()]
    found = micro_batch.find(
        sizes, lambda size: rehearse(step, setting, batch, size), setting.mesh.device,
        memory=_memory(), about=about,
    )  # fmt: skip
    del held
    return found


def remember(step: Step, setting: Setting, batch: Any, size: int, about: dict[str, Any]) -> None:
    """Remember this size for `largest_micro_batch`."""
    micro_batch.remember(size, memory=_memory(), about=_about(step, setting, batch, about))


def _memory() -> Path:
    return storage.cache_folder() / "micro_batch.json"


def _about(step: Step, setting: Setting, batch: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that the memory use depends on."""
    return {
        "model": [str(tuple(p.shape)) for p in step.model.parameters()], "ranks": setting.mesh.world.size,
        "device": device.name(setting.mesh.device), "precision": setting.precision,
        "batch": batches.shapes(batch), "optimizers": [type(o).__name__ for o in step.optimizers.values()],
        **about,
    }  # fmt: skip


def state_to_come(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Memory as large as the state that an optimizer has yet to create, on its parameters' devices."""
    if optimizer.state:
        return []
    held = [(local(p), kept) for group, kept in kept_for_each(optimizer) for p in group["params"]]
    return [
        torch.zeros(int(p.numel() * kept), dtype=torch.uint8, device=p.device).fill_(1) for p, kept in held
    ]


def kept_for_each(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], float]]:
    """An optimizer's groups, each with the bytes that it keeps per weight, see `memory.kept_per_weight`."""
    return [(group, _kept(optimizer, group)) for group in optimizer.param_groups if group["params"]]


def _kept(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    small = nn.Parameter(torch.zeros(256, 256, device=local(group["params"][0]).device))
    twin = object.__new__(type(optimizer))  # copy.copy omits attributes that a subclass adds
    twin.__dict__.update(optimizer.__dict__)
    twin.state = collections.defaultdict(dict)
    twin.param_groups = [{**group, "params": [small], "fused": None}]
    return memory.kept_per_weight(twin, small)


def rehearse(step: Step, setting: Setting, batch: Any, size: int) -> None:
    """A forward and backward pass in micro-batches of a size."""
    parts = list(batches.split(batch, size))
    if setting.mesh.size("stage") == 1:  # the second runs next to gradients; further ones take no more memory
        parts = parts[:2]
    divisor, setting.scale.divisor = setting.scale.divisor, setting.scale.divisor or 1.0
    try:
        with _leaving_no_trace(step.model):
            step.gradients(parts, Agreement(setting.mesh.world, setting.mesh.device, Requests))
    finally:
        step.model.zero_grad(set_to_none=True)
        setting.scale.divisor = divisor


def works_alone(step: Step, setting: Setting, strategy: str) -> bool:
    """Whether a rank can run a pass without the others taking part."""
    together = setting.mesh.world.size > 1 and any(
        isinstance(m, nn.SyncBatchNorm) for m in step.model.modules()
    )
    return setting.loss is not None and strategy in ("single", "ddp") and not together


def alone(step: Step, setting: Setting, part: Any) -> None:
    """A forward and backward pass over one micro-batch, see `works_alone`; its gradients are discarded."""
    with _leaving_no_trace(step.model):
        loss, _ = setting.loss_of(step.forward(part), part)
        torch.autograd.grad(loss, list(step.weights().values()), allow_unused=True)  # skips reducing hooks


@contextlib.contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Restore random state and buffers afterwards."""
    kept, buffers = random_state.capture(), Buffers(model)
    buffers.keep()
    try:
        yield
    finally:
        buffers.put_back()
        random_state.restore(*kept)


@torch.no_grad()
def weight_of(step: Step, setting: Setting, part: Any) -> float:
    """The weight of a micro-batch's loss; 0 on a rank that does not compute the loss."""
    with modes.evaluating(step.model):
        output = step.forward(part)
    return 0.0 if output is None else float(setting.loss_of(output, part)[1])
