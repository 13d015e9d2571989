"""Artifacts: the outputs of a run, with sizes and checksums; equal contents are stored once.

A file from outside the run is stored under its checksum in the runs folder and hard-linked into the run's
directory: a dataset logged by fifty runs takes the space of one. Both names refer to the same file, which is
therefore read-only. On a file system without hard links, a copy is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from stoker import storage
from stoker.run.directory import RunDirectory

STORE = ".artifacts"  # in the runs folder
_LONGEST_NAME = 230  # bytes of 255, since a file that is being written has a longer name
_COPYING = 3600.0  # seconds without a change after which a copy was left by a kill

_TASKS = {  # by the ending of the name of a transformers class
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}


def store(runs: Path) -> Path:
    """The folder of the contents that runs share."""
    return runs / STORE


def describe(directory: RunDirectory, path: Path) -> list[dict[str, Any]]:
    """Every file of an artifact: path relative to the run, size in bytes, SHA-256.

    Raises FileNotFoundError if `path` does not exist, ValueError if it is outside the run's directory.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    root = directory.path.resolve()
    found = []
    for file in storage.files_under(path):
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{file} leads outside the run, to {file.resolve()}: give the file itself")
        found.append(
            {
                "path": str(file.resolve().relative_to(root)),
                "size": file.stat().st_size,
                "sha256": storage.sha256(file),
            }
        )
    return found


def checked_name(name: str) -> str:
    """Check the name of an artifact, a path below the run's artifacts. Raises ValueError."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} is not a valid artifact name: give a relative path without '..'")
    if long := [part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME]:
        raise ValueError(
            f"{long[0][:40]}... in an artifact's name has more than {_LONGEST_NAME} bytes: give a shorter one"
        )
    return str(path)


def check_free(name: str, taken: Mapping[str, str]) -> None:
    """Check that what is brought in by this name replaces nothing else of the run. Raises ValueError.

    Args:
        taken: what lies at the paths below the run's artifacts that must stay as they are.
    """
    place = PurePosixPath(name)
    for path, what in taken.items():
        if place.is_relative_to(path) or PurePosixPath(path).is_relative_to(place):
            raise ValueError(
                f"an artifact named {name!r} would get in the way of {what}, kept at {path!r}: give it "
                "another name, run.artifact(path, name)"
            )


def bring_in(directory: RunDirectory, source: Path, name: str) -> Path:
    """Store a file or folder from outside, and link it into the run; returns its path in the run.

    An earlier artifact of the same name is replaced; its content stays in the store.
    Raises FileNotFoundError, and OSError if the disk is full.
    """
    if not source.exists():
        raise FileNotFoundError(source)
    directory.check_is_there()
    place = directory.artifacts / name
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = storage.unfinished(place)
    try:
        if source.is_dir():
            staged.mkdir()
            for file in storage.files_under(source):
                target = staged / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(store(directory.runs), file, target)
        else:
            _link(store(directory.runs), source, staged)
        _replace(staged, place)
    finally:
        remove(staged)
    return place


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def collect_garbage(runs: Path, older_than: float = 3600.0) -> int:
    """Delete stored contents that no run uses any more; returns the number of bytes freed.

    Contents stored less than `older_than` seconds ago are kept: a run may be about to link them. What a kill
    has left of a copy is deleted too.
    """
    freed = 0
    for file in (*store(runs).glob("*/*"), *store(runs).glob(".*.tmp")):
        least = max(older_than, _COPYING) if storage.is_unfinished(file) else older_than
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if status.st_nlink == 1 and time.time() - status.st_ctime >= least:
                file.unlink()
                freed += status.st_size
    return freed


def _link(kept: Path, file: Path, target: Path) -> None:
    """Link a file's content from the store into the run, after adding it to the store if needed."""
    kept.mkdir(exist_ok=True)
    temporary = storage.unfinished(kept / "content")
    try:
        shutil.copyfile(file, temporary)  # first: the hash is that of the copy, even if the file changes
        digest = storage.sha256(temporary)
        place = kept / digest[:2] / digest
        try:
            storage.link_or_copy(place, target)
        except FileNotFoundError:  # or just deleted by collect_garbage
            temporary.chmod(0o444)
            storage.sync_file(temporary)
            place.parent.mkdir(exist_ok=True)
            temporary.replace(place)
            storage.link_or_copy(place, target)
    finally:
        temporary.unlink(missing_ok=True)
    storage.sync_directory(target.parent)


def _replace(staged: Path, place: Path) -> None:
    if not (staged.is_dir() or place.is_dir()):
        staged.replace(place)
        return
    before = storage.unfinished(place)
    with contextlib.suppress(FileNotFoundError):
        place.rename(before)  # at once, and not removed file by file: a kill leaves one of the two
    staged.replace(place)
    remove(before)


def task_of(folder: Path) -> str | None:
    """The task of a folder of model files, in the hub's terms; None if the format is unknown to the hub."""
    if (folder / "adapter_config.json").is_file():
        return "text-generation"
    if not (folder / "config.json").is_file():
        return None
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = next(iter(described.get("architectures") or []), "")
    return next((task for ending, task in _TASKS.items() if kind.endswith(ending)), "text-generation")
