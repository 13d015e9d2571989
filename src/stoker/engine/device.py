"""The device of a rank."""

from __future__ import annotations

import platform

import torch
from stoker.world import World


def pick(world: World) -> torch.device:
    """The GPU of this local rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)  # NCCL and many kernels take the current one
        return device
    return torch.device("cpu")


def name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
