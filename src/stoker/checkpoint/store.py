"""Saving and loading: torch.distributed.checkpoint with safetensors shards, and JSON.

No code path reads a pickle. Tensors are loaded in place, into the model's existing memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import torch
from safetensors.torch import _TYPES as DTYPES
from safetensors.torch import save_file
from stoker import distributed, storage, threads
from stoker.checkpoint import manifest, planning, shards
from stoker.checkpoint.manifest import Checkpoint, File
from stoker.checkpoint.staging import HostBuffers
from stoker.errors import StokerError, Stopped
from stoker.tensors import local, real
from stoker.world import World
from torch.distributed.checkpoint import _hf_utils, state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Tensors = dict[str, torch.Tensor]

ALONE = World()

_VALUES = "state.json"

# For types that torch's reader does not know, such as complex numbers, it would assume float32.
_hf_utils.DTYPE_MAP.update(cast("dict[str, torch.dtype]", DTYPES))


class Saver:
    """Writes checkpoints alongside the training loop, all ranks together.

    The loop is stopped while the state is copied to host memory; a thread then writes it. Only one checkpoint
    is written at a time: the next one waits for it. A tensor that several ranks hold is written by one of
    them.

    Args:
        folder: contains the checkpoints, one directory each.
        world: the ranks that take part; all make the same calls.
        ours: called by the thread of rank 0 before it begins a checkpoint, and again just before the manifest
            is written; raises, or ends the process, if the folder now belongs to another process.
        before: called by the thread of every rank before what it wrote becomes a checkpoint.
        done: called by the thread of rank 0 with each checkpoint that is on disk.
    """

    def __init__(
        self,
        folder: Path,
        world: World = ALONE,
        *,
        ours: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
        done: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> None:
        self._folder, self._world = folder, world
        self._ours, self._before, self._done = ours, before, done
        self._group = distributed.beside_the_loop() if world.size > 1 else None
        self._buffers = HostBuffers()
        self._plan: tuple[planning.Signature, list[planning.Part]] | None = None
        self._writing: concurrent.futures.Future[None] | None = None

    def save(
        self,
        tensors: Tensors,
        values: Mapping[str, Any],
        about: About,
        finite: frozenset[str] = frozenset(),
    ) -> None:
        """Start writing a checkpoint of these tensors, and of rank 0's JSON values.

        When it returns, the tensors can be changed. Raises OSError if the previous checkpoint could not be
        written, StokerError if it was refused.

        Args:
            finite: names of tensors that must not contain NaN or infinity; otherwise no checkpoint is made.
        """
        self.wait()
        parts = self._parts(tensors)
        copies = self._buffers.copy({part.name: local(tensors[part.name]) for part in parts})
        encoded = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY) if self._world.rank == 0 else b""
        self._writing = threads.begun(
            lambda: self._write(parts, copies, encoded, about, finite), "checkpoint"
        )

    def wait(self, timeout: float | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until the current checkpoint is on disk.

        Raises OSError on all ranks if it could not be written; TimeoutError after `timeout` seconds.

        Args:
            meanwhile: called every second.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        while not concurrent.futures.wait([writing], 1.0 if timeout is None else timeout).done:
            meanwhile()
            if timeout is not None:
                raise TimeoutError(f"not within {timeout:.0f} s")
        writing.result()

    @property
    def failed(self) -> bool:
        """Whether the current checkpoint could not be written; `wait` raises the reason."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def _parts(self, tensors: Tensors) -> list[planning.Part]:
        """What this rank writes; planned again if tensors were added or changed on any rank."""
        signature = planning.signature(tensors)
        known = self._plan is not None and self._plan[0] == signature
        if self._plan is None or not all(distributed.gathered(known, self._group)):
            self._plan = signature, planning.parts(tensors, self._world.rank, self._group)
        return self._plan[1]

    def _write(
        self,
        parts: list[planning.Part],
        copies: Tensors,
        values: bytes,
        about: About,
        finite: frozenset[str],
    ) -> None:
        path = manifest.folder(self._folder, about.step)
        first = self._world.rank == 0
        files: list[File] = []
        error = _error_of(lambda: self._begin(path), path) if first else None
        self._raise_together(error, path)

        def write() -> None:
            _check_finite({name: copies[name] for name in finite & copies.keys()}, about.step)
            files.extend(shards.write(path, self._world.rank, parts, copies))
            self._before()

        written = [File(**entry) for entry in self._raise_together(_error_of(write, path), path, files)]
        error = _error_of(lambda: self._commit(path, written, values, about), path) if first else None
        self._raise_together(error, path)

    def _begin(self, path: Path) -> None:
        self._ours()
        manifest.begin(path)

    def _commit(self, path: Path, written: list[File], values: bytes, about: About) -> None:
        storage.write_atomically(path / _VALUES, values)
        files = [*written, File.of(path / _VALUES)]
        self._ours()
        checkpoint = manifest.commit(path, files, world_size=self._world.size, **dataclasses.asdict(about))
        self._done(checkpoint)

    def _raise_together(
        self, error: Exception | None, path: Path, files: Sequence[File] = ()
    ) -> list[dict[str, Any]]:
        """Raise on all ranks what failed on one; otherwise return the files of all ranks.

        A checkpoint that is not committed by then is removed; a committed one stays, whatever failed after
        it.
        """
        number = getattr(error, "errno", None)
        told = None if error is None else (str(error), isinstance(error, StokerError), number)
        mine = (told, [dataclasses.asdict(file) for file in files])
        answers = distributed.gathered(mine, self._group) if self._world.size > 1 else [mine]
        failed = next((told for told, _ in answers if told is not None), None)
        if failed is None:
            return [file for _, of_rank in answers for file in of_rank]
        said, for_user, number = failed
        if self._world.rank == 0 and not (path / manifest.NAME).exists():
            manifest.remove(path)
        if error is not None:
            raise error
        if for_user:
            raise StokerError(said)
        of_another = OSError(said)
        of_another.errno = number  # a full disk affects every rank
        raise of_another


@dataclass(frozen=True)
class About:
    """What the manifest says about a checkpoint."""

    step: int
    samples: int
    """Samples, in the global order, that were trained on."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def _check_finite(tensors: Tensors, step: int) -> None:
    """Raises StokerError."""
    for name, tensor in tensors.items():
        if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(real(tensor))):
            raise StokerError(
                f"step {step}: {name.removeprefix('model.')} is no longer finite, so no checkpoint is saved; "
                "the newest one is from before. Resume from it with on_bad_loss=skip or rewind, which check "
                "every gradient, or change what caused it (the learning rate, the data)"
            )


def _error_of(work: Callable[[], None], path: Path) -> Exception | None:
    """The error, if any, of work on the checkpoint at `path`: others must be told before it is raised."""
    try:
        work()
    except OSError as error:
        return manifest.gone(path) if manifest.is_gone(path, error) else error
    except Exception as error:
        return error
    return None


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The full shape and dtype of every tensor, from the headers of the shards."""
    metadata = _reader(checkpoint).read_metadata()
    return {
        name: (m.size, m.properties.dtype)
        for name, m in metadata.state_dict_metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }


def load_tensors(checkpoint: Checkpoint, into: Tensors, world: World = ALONE) -> None:
    """Fill the given tensors, or shards, in place with those of the same names; all ranks together.

    Raises `Stopped` on all ranks if one is told to stop meanwhile.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(
                cast("dict[str, Any]", into),
                storage_reader=_reader(checkpoint),
                no_dist=world.size == 1,
            )
    except CheckpointException as error:  # torch catches everything in it, to tell the other ranks
        stopped = next((raised for raised, _ in error.failures.values() if isinstance(raised, Stopped)), None)
        if stopped is not None:
            raise stopped from None
        raise


def _reader(checkpoint: Checkpoint) -> HuggingFaceStorageReader:
    """torch's reader, restricted to the verified files: it would read everything in the folder."""
    reader = HuggingFaceStorageReader(str(checkpoint.path))
    reader.fs = _OnlyThese(checkpoint.files)
    return reader


class _OnlyThese(FileSystem):
    """A file system whose folders contain only these files."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [file for file in super().ls(path) if Path(file).name in self._names]


def load_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON values of a checkpoint."""
    return cast("dict[str, Any]", orjson.loads((checkpoint.path / _VALUES).read_bytes()))


def export_model(checkpoint: Checkpoint, target: Path) -> Path:
    """Write the model's tensors of a checkpoint to one safetensors file, under the model's own names.

    If weights are averaged (`ema.decay`), the averages are written: they determine which checkpoint is best.
    """
    there = shapes(checkpoint)
    names = [name.removeprefix("model.") for name in there if name.startswith("model.")]
    sources = {name: f"ema.{name}" if f"ema.{name}" in there else f"model.{name}" for name in names}
    into = {source: torch.empty(there[source][0], dtype=there[source][1]) for source in sources.values()}
    load_tensors(checkpoint, into)
    save_file({name: into[source] for name, source in sources.items()}, target)
    storage.permit_as_folder(target)
    return target
