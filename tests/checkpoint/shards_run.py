"""What the ranks of test_golden.py do; run as a script, it writes the golden checkpoint anew."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stoker.checkpoint import store
from stoker.errors import Stopped
from stoker.status import INTERRUPTED
from stoker.world import World
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

VALUES = {"optimizers": {"main": {"lr": 0.1}}, "position": {"step": 3, "samples": 24}}


def whole() -> dict[str, torch.Tensor]:
    """The tensors, as one process holds them."""
    return {
        "model.weight": torch.arange(28.0).reshape(7, 4), "model.bias": torch.tensor([1.5, -2.0]),
        "model.half": torch.arange(6).to(torch.bfloat16), "optimizer.main.weight.step": torch.tensor(3.0),
        "random.0.torch": torch.arange(16, dtype=torch.uint8),
    }  # fmt: skip


def write(folder: Path) -> None:
    """Save them from two ranks, of which each holds a part of the weight."""
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    tensors = whole()
    mesh = init_device_mesh("cpu", (world.size,))
    tensors["model.weight"] = distribute_tensor(tensors["model.weight"], mesh, [Shard(0)])
    if world.rank > 0:
        del tensors["random.0.torch"]
    saver = store.Saver(folder, world)
    saver.save(tensors, VALUES, store.About(3, 24, {"loss": 0.5}))
    saver.wait()
    dist.destroy_process_group()


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Load them on as many ranks as there are, each its part of the weight; the whole of all is returned."""
    from stoker.checkpoint import manifest

    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    into = {name: torch.zeros_like(t) for name, t in whole().items()}
    mesh = init_device_mesh("cpu", (world.size,))
    into["model.weight"] = distribute_tensor(into["model.weight"], mesh, [Shard(0)])
    store.load_tensors(manifest.verify(folder), into, world)
    weight = into["model.weight"]
    assert isinstance(weight, DTensor)
    into["model.weight"] = weight.full_tensor()
    dist.destroy_process_group()
    return into


def read_and_be_told(folder: Path) -> str:
    """Load them on two ranks, of which the second is told to stop as it reads; how that ends is returned."""
    from stoker.checkpoint import manifest

    class Told(HuggingFaceStorageReader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            raise Stopped(INTERRUPTED)

    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    if world.rank == 1:
        store.HuggingFaceStorageReader = Told  # type: ignore[misc]
    try:
        store.load_tensors(manifest.verify(folder), whole(), world)
    except Stopped as stopped:
        return stopped.status
    finally:
        dist.destroy_process_group()
    return ""


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import ranks

    ranks.run(write, 2, Path(tempfile.mkdtemp()), Path(__file__).parent / "golden")
