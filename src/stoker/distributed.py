"""The process group of a run, and communication that is not part of a step."""

from __future__ import annotations

import atexit
import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from stoker import supervision, tensors
from stoker.errors import BadInput, StokerError
from stoker.world import World

T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=30)
_TIMEOUT_BEFORE_STEPS = datetime.timedelta(hours=48)  # data may be tokenised for hours


def join(world: World, backend: str = "auto", *, alone: bool = False) -> None:
    """Join the process group of this launch, unless it was joined already.

    CPU tensors go through gloo, GPU tensors through NCCL.

    Args:
        backend: auto, gloo or nccl.
        alone: create a group even for a single process, which FSDP and DeepSpeed need.

    Raises:
        BadInput: backend=nccl without a GPU.
    """
    if dist.is_initialized() or (world.size == 1 and not alone):
        return
    if world.planned:
        _imagine(world)
        return
    gpu = torch.cuda.is_available() and backend != "gloo"
    if backend == "nccl" and not gpu:
        raise BadInput("backend=nccl: this machine has no GPU; use backend=auto or backend=gloo")
    supervision.joining(True)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        rank=world.rank, world_size=world.size, timeout=_TIMEOUT,
        store=torch._C._distributed_c10d.HashStore() if world.size == 1 else None,
    )  # fmt: skip
    supervision.joining(False)
    atexit.register(leave)


def _imagine(world: World) -> None:
    """Create a group of ranks that do not exist: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=world.planned_rank, world_size=world.size, store=FakeStore())


def _are_there() -> bool:
    """Whether there are other, real ranks."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first(world: World) -> Iterator[None]:
    """Rank 0 executes the block first, then the other ranks, which find what it has cached.

    Every rank waits until all are done. That may take hours, because ranks without a shared cache take as
    long as rank 0. If a rank dies, the others stop waiting at once.
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
    """A small value of rank 0, on every rank."""
    if not _are_there():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def done_by_rank_zero(world: World, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, a small value, on every rank.

    A StokerError that it raises on rank 0 is raised on every rank: none waits for one that has ended.
    """
    done: Any = None
    if world.rank == 0:
        try:
            done = work()
        except StokerError as error:
            done = error
    done = from_rank_zero(done)
    if isinstance(done, StokerError):
        raise done
    return cast("T", done)


def gathered(value: Any, group: Any = None) -> list[Any]:
    """A small value of each rank of a group (default: all ranks), in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    held: list[Any] = [value] * dist.get_world_size(group)
    if not _are_there():
        return held
    dist.all_gather_object(held, value, group=group)
    return held


def beside_the_loop() -> Any:
    """A gloo process group of all ranks for use by another thread; None for a single process."""
    return _by_gloo(_TIMEOUT)


def _by_gloo(timeout: datetime.timedelta) -> Any:
    return dist.new_group(backend="gloo", timeout=timeout) if _are_there() else None


@torch.no_grad()
def copy_from_rank_zero(model: torch.nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every rank, except those on the meta device.

    In place, but for sparse buffers, of which ranks may hold another number of elements.
    """
    if dist.is_initialized():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not (tensor.is_meta or tensors.is_sparse(tensor)):
                _copy_from_rank_zero(tensor.detach())
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and tensors.is_sparse(buffer):
                    if buffer not in made:
                        made[buffer] = from_rank_zero(buffer.cpu()).to(buffer.device)
                    module._buffers[name] = made[buffer]


def _copy_from_rank_zero(tensor: torch.Tensor) -> None:
    """Copy a dense tensor; backends broadcast only those whose elements fill their memory.

    gloo does not refuse others: what it leaves in one that has gaps, such as `x[::2]`, is wrong.
    """
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:  # its elements are one
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    if tensor.is_contiguous():
        dist.broadcast(tensor, src=0)
    else:
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def _wait(group: Any) -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        # Reduces a CPU tensor, since a barrier in a group with NCCL would need a GPU.
        dist.all_reduce(torch.zeros(1), group=group)


_HEADER = 16  # integers: dtype, number of dimensions, sizes
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
    """Receive a tensor from a rank that calls `send`."""
    header = torch.zeros(_HEADER, dtype=torch.int64, device=device)
    dist.recv(header, rank, group)
    dtype, dims, *sizes = header.tolist()
    tensor = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=device)
    dist.recv(tensor, rank, group)
    return tensor
