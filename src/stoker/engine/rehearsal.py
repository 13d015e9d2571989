"""What is found out before the first step, by passes that leave no trace but in memory."""

from __future__ import annotations

from typing import Any

import torch
from stoker import storage
from stoker.engine import batches, device, micro_batch, random_state
from stoker.engine.agreement import Agreement, Requests
from stoker.engine.step import Setting, Step
from stoker.world import World


def largest_micro_batch(step: Step, setting: Setting, world: World, batch: Any, about: dict[str, Any]) -> int:
    """The largest micro-batch that fits, found by trying, remembered for this model and device.

    Args:
        batch: this rank's share of a global batch, on the device.
        about: what else the memory that is needed depends on.

    Raises:
        StokerError: not even one sample fits.
    """
    about = {
        "model": [str(tuple(p.shape)) for p in step.model.parameters()], "ranks": world.size,
        "device": device.name(setting.mesh.device), "precision": setting.precision,
        "batch": batches.shapes(batch), **about,
    }  # fmt: skip
    return micro_batch.find(
        batches.size(batch), lambda size: rehearse(step, setting, world, batch, size), setting.mesh.device,
        memory=storage.cache_folder() / "micro_batch.json", about=about,
    )  # fmt: skip


def rehearse(step: Step, setting: Setting, world: World, batch: Any, size: int) -> None:
    """A forward and backward pass in micro-batches of a size."""
    parts = list(batches.split(batch, size))[: setting.mesh.size("stage")]
    kept = random_state.capture()
    buffers = {name: b.clone() for name, b in step.model.named_buffers()}
    divisor, setting.scale.divisor = setting.scale.divisor, setting.scale.divisor or 1.0
    try:
        step.gradients(parts, Agreement(world, setting.mesh.device, Requests))
    finally:
        step.model.zero_grad(set_to_none=True)
        for name, buffer in step.model.named_buffers():
            buffer.copy_(buffers[name])
        random_state.restore(*kept)
        setting.scale.divisor = divisor


@torch.no_grad()
def weight_of(step: Step, setting: Setting, part: Any) -> float:
    """What the loss of a micro-batch weighs; 0 on a rank that does not see the loss."""
    assert setting.loss is not None
    step.model.eval()
    output = step.forward(part)
    step.model.train()
    return 0.0 if output is None else float(setting.loss(output, part)[1])
