"""The memory that a rank holds, by purpose, and its peak."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from stoker import words
from stoker.engine import blocks
from stoker.engine.mesh import Mesh
from stoker.engine.settings import Training
from stoker.engine.step import Step
from stoker.errors import BadInput
from stoker.world import World
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

COLUMNS = ("rank", "weights, GiB", "gradients", "optimizer", "activations and others", "peak")
"""The names of what `Trainer.memory` returns."""


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once; of sharded tensors only this rank's shards."""
    sizes: dict[int, int] = {}
    for local in plain(tensors):
        if isinstance(local, FakeTensor):
            continue
        try:
            storage = local.untyped_storage()
        except (NotImplementedError, RuntimeError):  # only a wrapper, without storage
            continue
        if storage.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def plain(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """This rank's shards, and the tensors inside wrappers such as torchao's 8-bit states."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            yield from plain([tensor.to_local()])
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from plain(getattr(tensor, name) for name in names)
        else:
            yield tensor


def kept_per_weight(optimizer: torch.optim.Optimizer, small: nn.Parameter) -> float:
    """Bytes that an optimizer keeps per element of a large parameter: measured with a step on a small one."""
    small.grad = torch.zeros_like(small)
    optimizer.step()
    return held(t for t in optimizer.state[small].values() if isinstance(t, torch.Tensor)) / small.numel()


def peak(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_kind(step: Step, device: torch.device, training: Training) -> dict[str, int]:
    """Bytes that this rank holds: weights, gradients (while they exist), optimizer state; and its peak.

    On a CPU the peak is that of the whole process, including its loaded code.
    """
    together = max if training.optimizer_in_backward else sum
    own = list(step.weights().values())
    # DeepSpeed wraps the optimizer.
    states = [getattr(o, "optimizer", o).state.values() for o in step.optimizers.values()]
    kept = (t for state in states for of in state for t in of.values() if isinstance(t, torch.Tensor))
    return {
        "weights": held([*step.model.parameters(), *step.model.buffers(), *own]),
        "gradients": together(4 * t.numel() for t in plain(own)),
        "optimizer": held(kept),
        "peak": peak(device),
    }


def of_a_rank(device: torch.device, world: World) -> int:
    """Bytes available to a rank: those of its GPU, or its share of this machine's memory."""
    if world.planned:
        return world.planned
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total // world.local_size)


@dataclass(frozen=True)
class Needed:
    """Bytes that a rank needs before any activations, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """The largest block, gathered while it is used."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    def __str__(self) -> str:
        parts = {k.replace("optimizer", "optimizer state"): v for k, v in vars(self).items() if v}
        return ", ".join(f"{name} {words.size(count)}" for name, count in parts.items())


MOMENTS = 8.0
"""Bytes that AdamW keeps per weight: two float32 values."""


def needed(
    model: nn.Module,
    found: Iterable[tuple[str, nn.Module]],
    strategy: str,
    training: Training,
    ranks: int,
    moments: float = MOMENTS,
) -> Needed:
    """The memory that a rank will need for a model, which may be on the meta device.

    Args:
        found: the blocks, one of which is gathered at a time if parameters are sharded.
        ranks: the number of ranks that the strategy shards over.
        moments: bytes that the optimizer keeps per weight.
    """
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stage = training.deepspeed.stage or 0 if strategy == "deepspeed" else 0
    whole = {"fsdp": 3, "pipeline": 3, "deepspeed": stage}.get(strategy, 0)
    by = [ranks if whole >= least else 1 for least in (3, 2, 1)]  # weights, gradients, optimizer state
    largest = blocks.largest(found)
    gathers = strategy == "fsdp" or stage == 3
    largest_one = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    together = largest_one if training.optimizer_in_backward else trained
    return Needed(
        weights // by[0], together * 4 // by[1], int(trained * moments) // by[2],
        largest if gathers and ranks > 1 else 0,
    )  # fmt: skip


class TooLarge(BadInput):
    """A model that does not fit on a rank."""


def check_fits(
    model: nn.Module,
    found: Iterable[tuple[str, nn.Module]],
    strategy: str,
    training: Training,
    mesh: Mesh,
    moments: float = MOMENTS,
) -> None:
    """Refuse a model that does not fit, before any of it is loaded.

    Raises:
        TooLarge: with the memory it needs, by purpose, and the number of ranks on which it would fit.
    """
    shards = mesh.size("stage") if strategy == "pipeline" else mesh.size("shard")
    divides = {"fsdp": shards, "pipeline": shards, "deepspeed": mesh.world.size}.get(strategy, 1)
    wanted = needed(model, found, strategy, training, divides, moments)
    has = of_a_rank(mesh.device, mesh.world)
    offloads = training.fsdp.offload or training.deepspeed.offload_optimizer
    if wanted.total <= has or offloads:
        return
    count = sum(p.numel() for p in model.parameters())
    fitting = ranks_that_hold(model, found, training, 0.8 * has, moments)
    raise TooLarge(
        f"a model with {count / 1e9:,.1f} billion parameters needs {words.size(wanted.total)} per rank with "
        f"parallel={strategy}, before any activations: {wanted}; a rank here has {words.size(has)}. "
        + (
            f"It would fit with parallel=fsdp on {fitting} such ranks"
            if fitting
            else "No number of ranks would be enough"
        )
    )


def ranks_that_hold(
    model: nn.Module,
    found: Iterable[tuple[str, nn.Module]],
    training: Training,
    room: float,
    moments: float,
) -> int | None:
    """The smallest number of ranks, at least 2, whose shards fit under FSDP; None if there is none."""
    each = list(found)
    fits = (n for n in range(2, 4097) if needed(model, each, "fsdp", training, n, moments).total <= room)
    return next(fits, None)
