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
from safetensors import safe_open
from safetensors.torch import save_file
from stoker.checkpoint import manifest
from stoker.checkpoint.manifest import Checkpoint
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

Tensors = dict[str, torch.Tensor]

_VALUES = "state.json"


def save(
    checkpoints: Path,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    *,
    step: int,
    samples: int,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Write a checkpoint and return it once it is on disk. Raises OSError; then none was made."""
    path = manifest.folder(checkpoints, step)
    manifest.begin(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True),
                no_dist=True,
            )
        (path / _VALUES).write_bytes(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
        return manifest.commit(path, step=step, samples=samples, world_size=1, metrics=metrics)
    except CheckpointException as error:
        manifest.remove(path)
        raise _cause(error) from error
    except BaseException:
        manifest.remove(path)
        raise


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of every tensor, from the headers of the shards."""
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                found[name] = _spec(shard.get_slice(name))
    return found


def load_tensors(checkpoint: Checkpoint, into: Tensors) -> None:
    """Fill the given tensors in place with those of the same names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(
            cast("dict[str, Any]", into),
            storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
            no_dist=True,
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


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def _spec(piece: Any) -> tuple[torch.Size, torch.dtype]:
    return torch.Size(piece.get_shape()), _DTYPES[piece.get_dtype()]


def _cause(error: CheckpointException) -> BaseException:
    """The first failure behind DCP's wrapper: an OSError where the disk said no."""
    for failure in error.failures.values():
        return failure[0] if isinstance(failure, tuple) else failure
    return error
