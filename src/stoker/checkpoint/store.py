"""Saving and loading: torch.distributed.checkpoint with safetensors shards, and JSON.

No pickle is read on any path. Tensors are loaded in place, into memory the model has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import orjson
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from stoker.checkpoint import manifest
from stoker.checkpoint.manifest import Checkpoint
from stoker.world import World
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]

ALONE = World()

_VALUES = "state.json"


def save(
    checkpoints: Path,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    *,
    step: int,
    samples: int,
    world: World = ALONE,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint | None:
    """Write a checkpoint, all ranks together, each its tensors; rank 0 returns it once it is on disk.

    A tensor that several ranks hold is written by one of them. `values` are rank 0's.
    Raises OSError; then none was made.
    """
    path = manifest.folder(checkpoints, step)
    try:
        if world.rank == 0:
            manifest.begin(path)
        _wait(world)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(
                {name: _packed(tensor) for name, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True),
                no_dist=world.size == 1,
            )
        if world.rank > 0:
            return None
        (path / _VALUES).write_bytes(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
        return manifest.commit(path, step=step, samples=samples, world_size=world.size, metrics=metrics)
    except CheckpointException as error:
        manifest.remove(path)
        raise _cause(error) from error
    except BaseException:
        manifest.remove(path)
        raise


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of every tensor, whole, from the headers of the shards."""
    metadata = HuggingFaceStorageReader(str(checkpoint.path)).read_metadata()
    return {
        name: (m.size, m.properties.dtype)
        for name, m in metadata.state_dict_metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }


def load_tensors(checkpoint: Checkpoint, into: Tensors, world: World = ALONE) -> None:
    """Fill the given tensors, or shards, in place with those of the same names; all ranks together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(
            cast("dict[str, Any]", into),
            storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
            no_dist=world.size == 1,
        )


def load_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON values of a checkpoint."""
    return cast("dict[str, Any]", orjson.loads((checkpoint.path / _VALUES).read_bytes()))


def export_model(checkpoint: Checkpoint, target: Path) -> Path:
    """Write the model's tensors of a checkpoint to one safetensors file, under the model's own names."""
    tensors = {
        name.removeprefix("model."): torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in shapes(checkpoint).items()
        if name.startswith("model.")
    }
    load_tensors(checkpoint, {f"model.{name}": tensor for name, tensor in tensors.items()})
    save_file(tensors, target)
    return target


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """safetensors takes contiguous tensors only, and images' weights may be channels last."""
    return tensor if isinstance(tensor, DTensor) or tensor.is_contiguous() else tensor.contiguous()


def _wait(world: World) -> None:
    if world.size > 1:
        dist.all_reduce(torch.zeros(1))


def _cause(error: CheckpointException) -> BaseException:
    """The first failure behind DCP's wrapper: an OSError where the disk said no."""
    for failure in error.failures.values():
        return failure[0] if isinstance(failure, tuple) else failure
    return error
