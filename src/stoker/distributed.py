"""Joining the other processes of a run, and doing things with them that are not part of a step."""

from __future__ import annotations

import atexit
import contextlib
import datetime
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from stoker import supervision
from stoker.errors import BadInput
from stoker.world import World

_TIMEOUT = datetime.timedelta(minutes=30)
_TIMEOUT_BEFORE_STEPS = datetime.timedelta(hours=48)  # data may be tokenised for hours


def join(world: World, backend: str = "auto", *, alone: bool = False) -> None:
    """Take part in the process group of this launch; a second time there is nothing to do.

    CPU tensors go through gloo, GPU tensors through NCCL.

    Args:
        backend: auto, gloo or nccl.
        alone: a single process makes a group too, as FSDP and DeepSpeed need one.

    Raises:
        BadInput: NCCL was asked for, and there is no GPU.
    """
    if dist.is_initialized() or (world.size == 1 and not alone):
        return
    if world.planned:
        _imagine(world)
        return
    gpu = torch.cuda.is_available() and backend != "gloo"
    if backend == "nccl" and not gpu:
        raise BadInput("backend=nccl: there is no GPU here; leave backend to auto, or give gloo")
    supervision.joining(True)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        rank=world.rank, world_size=world.size, timeout=_TIMEOUT,
        store=torch._C._distributed_c10d.HashStore() if world.size == 1 else None,
    )  # fmt: skip
    supervision.joining(False)
    atexit.register(leave)


def _imagine(world: World) -> None:
    """A group of ranks that are not there: what is sent goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which makes the backend known

    dist.init_process_group("fake", rank=world.planned_rank, world_size=world.size, store=FakeStore())


def _are_there() -> bool:
    """Whether there are other ranks that answer."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def leave() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first(world: World) -> Iterator[None]:
    """Rank 0 goes through the block alone, the others after it: what it caches, they find.

    Nobody leaves before all have been through, which may take hours: where ranks share no cache, the
    others work as long. A rank that dies ends the wait of the others at once.
    """
    group = _by_gloo(_TIMEOUT_BEFORE_STEPS)
    if world.rank > 0:
        _wait(group)
    try:
        yield
    finally:
        if world.rank == 0:
            _wait(group)
    _wait(group)


def from_rank_zero(value: Any) -> Any:
    """A small value (None, or of JSON's types) of rank 0, on every rank."""
    if not _are_there():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def gathered(value: Any, group: Any = None) -> list[Any]:
    """A small value of each rank of a group (by default all), in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    held: list[Any] = [value] * dist.get_world_size(group)
    if not _are_there():
        return held
    dist.all_gather_object(held, value, group=group)
    return held


def beside_the_loop() -> Any:
    """A process group of all ranks for a thread of its own, by gloo; none for a single process."""
    return _by_gloo(_TIMEOUT)


def _by_gloo(timeout: datetime.timedelta) -> Any:
    return dist.new_group(backend="gloo", timeout=timeout) if _are_there() else None


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        _wait()


def copy_from_rank_zero(model: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, in place; but for those on the meta device."""
    if dist.is_initialized():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_meta:
                dist.broadcast(tensor.detach(), src=0)


def _wait(group: Any = None) -> None:
    if dist.is_initialized():
        # A reduction of a CPU tensor, since a barrier of a group with NCCL would want a GPU.
        dist.all_reduce(torch.zeros(1), group=group)


def all_reduce(tensor: torch.Tensor, op: Any = None, group: Any = None) -> torch.Tensor:
    """The tensor, reduced in place over the ranks of a group (all by default); sums by default."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=cast("Any", op or dist.ReduceOp.SUM), group=group)
    return tensor


_HEADER = 16  # whole numbers: dtype, dims, sizes
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def send(tensor: torch.Tensor, rank: int, group: Any = None) -> None:
    """Send a tensor of any shape to a rank that calls `receive`."""
    header = torch.zeros(_HEADER, dtype=torch.int64)
    header[: tensor.dim() + 2] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
    dist.send(header.to(tensor.device), rank, group)
    dist.send(tensor.contiguous(), rank, group)


def receive(rank: int, device: torch.device, group: Any = None) -> torch.Tensor:
    """What a rank that calls `send` sends."""
    header = torch.zeros(_HEADER, dtype=torch.int64, device=device)
    dist.recv(header, rank, group)
    dtype, dims, *sizes = header.tolist()
    tensor = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=device)
    dist.recv(tensor, rank, group)
    return tensor
