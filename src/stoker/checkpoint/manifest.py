"""The manifest: what makes a directory a checkpoint.

It lists every file with its size and checksum, and is written last, after all of them are
on disk. A directory without a valid one does not exist for a reader, so a save that was
killed, a disk that was full and a bit that flipped are all passed over the same way.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.run.series import Goal

FORMAT = 1
NAME = "manifest.json"
_FOLDER = re.compile(r"step-(\d{8,})")


class InvalidCheckpoint(Exception):
    """Why a directory is no checkpoint that may be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was verified."""

    path: Path
    step: int
    samples: int
    """Samples of the global order that were trained on."""
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric when it was taken."""


def folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step stands: `step-00000500`."""
    return checkpoints / f"step-{step:08d}"


def begin(path: Path) -> None:
    """Make the directory of a new checkpoint; what an earlier, unusable save left there goes first."""
    if path.exists():
        remove(path)
    path.mkdir(parents=True)


def commit(
    path: Path, *, step: int, samples: int, world_size: int, metrics: Mapping[str, float] | None = None
) -> Checkpoint:
    """Make what was written to `path` a checkpoint: sync every file, then write the manifest."""
    files = [
        {"path": file.name, "size": file.stat().st_size, "sha256": storage.sha256(file)}
        for file in storage.files_under(path)
    ]
    for file in files:
        storage.sync_file(path / str(file["path"]))
    known = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
    manifest = {
        "format": FORMAT, "step": step, "samples": samples, "world_size": world_size, "metrics": known,
        "files": files,
    }  # fmt: skip
    storage.write_atomically(path / NAME, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    storage.sync_directory(path.parent)
    return Checkpoint(path, step, samples, sum(int(str(f["size"])) for f in files), known)


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it. Raises InvalidCheckpoint."""
    manifest = _read(path)
    for entry in manifest["files"]:
        file = path / entry["path"]
        if not file.is_file():
            raise InvalidCheckpoint(f"{file.name} is missing")
        if file.stat().st_size != entry["size"]:
            raise InvalidCheckpoint(f"{file.name} has {file.stat().st_size} bytes, not {entry['size']}")
        if storage.sha256(file) != entry["sha256"]:
            raise InvalidCheckpoint(f"{file.name} does not match its checksum")
    size = sum(f["size"] for f in manifest["files"])
    return Checkpoint(path, manifest["step"], manifest["samples"], size, manifest.get("metrics", {}))


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and those passed over, each with the reason."""
    passed_over: list[str] = []
    for path in reversed(_folders(checkpoints)):
        try:
            return verify(path), passed_over
        except InvalidCheckpoint as reason:
            passed_over.append(f"{path.name}: {reason}")
    return None, passed_over


def best(checkpoints: Path, metric: str, goal: Goal) -> Path | None:
    """The committed checkpoint with the best value of a metric, the earliest of equal ones, or None."""
    values: dict[Path, float] = {}
    for path in committed(checkpoints):
        with contextlib.suppress(InvalidCheckpoint):
            value = _read(path).get("metrics", {}).get(metric)
            if value is not None:
                values[path] = value
    pick = min if goal == "min" else max
    return pick(values, key=lambda path: values[path], default=None)


def prune(checkpoints: Path, keep: int, also: Path | None = None) -> None:
    """Delete all but the newest `keep` committed checkpoints and `also`, and uncommitted ones before them."""
    newest = committed(checkpoints)[-keep:]
    for path in _folders(checkpoints):
        if newest and path.name < newest[0].name and path != also:
            remove(path)


def committed(checkpoints: Path) -> list[Path]:
    """The checkpoints that have a manifest, by step; nothing else of them was checked."""
    return [path for path in _folders(checkpoints) if (path / NAME).is_file()]


def remove(path: Path) -> None:
    """Delete a checkpoint; its manifest first, so that it is none while its files go."""
    with contextlib.suppress(FileNotFoundError):
        (path / NAME).unlink()
    shutil.rmtree(path, ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = orjson.loads((path / NAME).read_bytes())
    except FileNotFoundError:
        raise InvalidCheckpoint("it has no manifest: saving it was not finished") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise InvalidCheckpoint(f"its manifest cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InvalidCheckpoint(f"its manifest is not of format {FORMAT}")
    return manifest
