"""A rank's shards: safetensors files of at most half a GiB, each with a checksum.

Their layout is that of torch's `HuggingFaceStorageWriter(save_distributed=True)`, whose reader is used:
next to the tensors they record where each begins in the full one, and nothing else, so that the same tensors
always give the same bytes: the checksums of two runs' checkpoints can be compared without their files.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from stoker import storage
from stoker.checkpoint.manifest import File
from stoker.checkpoint.planning import Part
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

_FILE = 2**29  # bytes; several files are written, and verified, in parallel
_THREADS = 2


def write(folder: Path, rank: int, parts: Sequence[Part], tensors: Mapping[str, torch.Tensor]) -> list[File]:
    """Write this rank's parts, synced to disk; returns the files with their checksums. Raises OSError."""
    names = [f"rank-{rank:05}-{n:03}.safetensors" for n in range(len(parts))]
    jobs = list(zip(names, _divided(parts, tensors), strict=False))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda job: _write(folder / job[0], job[1], tensors), jobs))


def _write(file: Path, parts: Sequence[Part], tensors: Mapping[str, torch.Tensor]) -> File:
    offsets = {part.name: {SAVED_OFFSETS_KEY: part.offsets} for part in parts}
    about = {CUSTOM_METADATA_KEY: json.dumps(offsets)}  # safetensors writes several in any order
    try:
        save_file({part.name: tensors[part.name] for part in parts}, file, about)
    except SafetensorError as error:  # for example, a full disk
        raise _os_error(error, file) from error
    storage.permit_as_folder(file)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        synced = pool.submit(storage.sync_file, file)  # the disk writes while the checksum is computed
        known = File.of(file)
        synced.result()
    return known


def _os_error(error: SafetensorError, file: Path) -> OSError:
    """The disk's error, which safetensors reports only in its text, `... (os error 28)`."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(errno.EIO, str(error), str(file))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(file))


def _divided(parts: Sequence[Part], tensors: Mapping[str, torch.Tensor]) -> Iterator[list[Part]]:
    """The parts in groups of at most `_FILE` bytes; a larger tensor gets its own group."""
    group: list[Part] = []
    size = 0
    for part in parts:
        new = tensors[part.name].nbytes
        if group and size + new > _FILE:
            yield group
            group, size = [], 0
        group.append(part)
        size += new
    if group:
        yield group
