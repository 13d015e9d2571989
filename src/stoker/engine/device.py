"""The device of a rank."""

from __future__ import annotations

import os

import torch
from stoker import distributed, machine
from stoker.errors import BadInput
from stoker.words import counted
from stoker.world import World


def pick(world: World) -> torch.device:
    """The GPU of this local rank if there are GPUs, else the CPU; `check_apart` once the ranks have met.

    Raises BadInput if this machine has fewer GPUs than ranks.
    """
    if torch.cuda.is_available() and not world.planned:
        if not (alone := _sees_its_own(world)):
            check(world.local_size)
        device = torch.device("cuda", 0 if alone else world.local_rank)
        torch.cuda.set_device(device)  # NCCL and many kernels use the current device
        return device
    return torch.device("cpu")


def _sees_its_own(world: World) -> bool:
    """Whether this rank may have been given a GPU that the others do not see, as by `--gpus-per-task=1`."""
    hides = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return hides and world.local_size > 1 and torch.cuda.device_count() == 1


def count(world: World) -> int:
    """The GPUs of this machine; in a plan, as many as there are ranks."""
    return world.size if world.planned else torch.cuda.device_count()


def check(ranks: int) -> None:
    """Raises BadInput if ranks of this machine would have to share a GPU, which NCCL refuses."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise BadInput(
            f"{counted(ranks, 'rank')} on a machine with {counted(gpus, 'GPU')}: each rank needs its own; "
            f'use --nproc {gpus}, or CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )


def check_apart(device: torch.device) -> None:
    """Raises BadInput on every rank if two of them see the same GPU; all ranks call it."""
    if device.type != "cuda":
        return
    seen = distributed.gathered(str(torch.cuda.get_device_properties(device).uuid))
    shared = [rank for rank, gpu in enumerate(seen) if seen.count(gpu) > 1]
    if shared:
        raise BadInput(
            f"ranks {', '.join(map(str, shared))} share a GPU: each rank needs its own; "
            'start one for each GPU, or set CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )


def move(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device in place, except what is on the meta device."""
    model._apply(lambda t: t if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]


def name(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return machine.processor()
