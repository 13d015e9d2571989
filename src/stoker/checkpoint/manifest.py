"""The manifest: the file that makes a directory a checkpoint.

It lists every file with its size and checksum, has a checksum itself, and is written last, after all files
are on disk. A directory without a valid manifest does not exist for readers, so an interrupted save, a full
disk and a flipped bit are all handled in the same way: the checkpoint is passed over.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import xxhash
from stoker import storage
from stoker.errors import StokerError
from stoker.object_store import Unreachable
from stoker.run import directory
from stoker.run.series import Goal

FORMAT = 6
_READABLE = (2, 3, 4, 5, FORMAT)
"""Format 2 had no checksum for the manifest itself; from 6 on, states of 8 bits have their codes."""
_DETERMINED = 5
"""The first format in which equal tensors are equal bytes."""
NAME = directory.MANIFEST
_GONE = (errno.ENOENT, errno.ESTALE)
_VOID = "void-manifest.json"
_THREADS = 2
_OF_ANOTHER = re.compile(
    "the checkpoint (is from a different model|has .*, but the model has no)|the checkpoint's optimizers? "
)

Mend = Callable[[Path, Callable[[bytes], "list[File]"]], None]
"""Restores the files of a checkpoint that do not match its manifest in an object store; the second argument
checks that manifest and lists its files, or raises InvalidCheckpoint."""


class InvalidCheckpoint(Exception):
    """Why a directory is not a usable checkpoint."""


class NotFetched(InvalidCheckpoint):
    """It is not usable here, and its object store, which may have it whole, cannot be reached."""


@dataclass(frozen=True)
class File:
    """A file of a checkpoint."""

    path: str
    size: int
    xxh3: str

    @classmethod
    def of(cls, file: Path) -> File:
        """Describe a file as it is now."""
        return cls(file.name, file.stat().st_size, storage.xxh3(file))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all verified."""

    path: Path
    step: int
    samples: int
    """Samples, in the global order, that were trained on."""
    bytes: int
    files: frozenset[str]
    """The names of its files; other files in its directory do not belong to it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric when it was saved."""

    @classmethod
    def of(cls, path: Path, manifest: Mapping[str, Any], files: Sequence[File]) -> Checkpoint:
        """The checkpoint that a manifest describes."""
        size, names = sum(file.size for file in files), frozenset(file.path for file in files)
        return cls(path, manifest["step"], manifest["samples"], size, names, manifest["metrics"])


def folder(checkpoints: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return checkpoints / directory.step_folder(step)


def gone(path: Path) -> StokerError:
    """The error of a checkpoint whose run is no longer where it was."""
    return directory.gone(path.parent.parent)


def is_gone(path: Path, error: OSError) -> bool:
    """Whether an error of writing a checkpoint is due to its run's being moved or deleted, maybe just now."""
    with contextlib.suppress(OSError):  # on NFS, what was moved elsewhere is stale
        return error.errno in _GONE and not path.exists()
    return error.errno in _GONE


def begin(path: Path) -> None:
    """Create the directory of a new checkpoint, after removing remains of an earlier, unusable save.

    Raises StokerError if the run's own directory no longer exists.
    """
    if path.exists():
        remove(path)
    if not path.parent.parent.exists():
        raise gone(path)
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)
        storage.sync_directory(path.parent.parent)
    path.mkdir()


def commit(
    path: Path,
    files: Sequence[File],
    *,
    step: int,
    samples: int,
    world_size: int,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Write the manifest, which makes a directory whose files are on disk a checkpoint."""
    known = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
    manifest: dict[str, Any] = {
        "format": FORMAT, "step": step, "samples": samples, "world_size": world_size, "metrics": known,
        "files": [dataclasses.asdict(file) for file in files],
    }  # fmt: skip
    manifest["xxh3"] = _checksum(manifest)
    storage.write_atomically(path / NAME, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    storage.sync_directory(path.parent)
    return Checkpoint.of(path, manifest, files)


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it. Raises InvalidCheckpoint."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda file: _verify(path, file), _files(_read(path))):
            pass
    return read(path)


def read(path: Path) -> Checkpoint:
    """A checkpoint according to its manifest, without checking its files. Raises InvalidCheckpoint."""
    manifest = _read(path)
    return Checkpoint.of(path, manifest, _files(manifest))


def sums(path: Path) -> dict[str, str]:
    """The checksums of a checkpoint's tensors, by the names of their files. Raises InvalidCheckpoint."""
    return {file.path: file.xxh3 for file in _files(_read(path)) if file.path.endswith(".safetensors")}


def is_determined(path: Path) -> bool:
    """Whether equal tensors have equal checksums in a checkpoint, which older ones do not promise.

    Raises InvalidCheckpoint.
    """
    return bool(_read(path)["format"] >= _DETERMINED)


def _files(manifest: Mapping[str, Any]) -> list[File]:
    try:
        files = [File(**entry) for entry in manifest["files"]]
        outside = [file.path for file in files if Path(file.path).name != file.path]
    except TypeError as error:
        raise InvalidCheckpoint(f"its manifest has invalid file entries: {error}") from error
    if outside:
        raise InvalidCheckpoint(f"its manifest names a file outside its directory: {outside[0]}")
    return files


def _verify(path: Path, known: File) -> None:
    file = path / known.path
    try:
        if not file.is_file():
            raise InvalidCheckpoint(f"{known.path} is missing")
        if file.stat().st_size != known.size:
            raise InvalidCheckpoint(f"{known.path} has {file.stat().st_size} bytes, not {known.size}")
        if storage.xxh3(file) != known.xxh3:
            raise InvalidCheckpoint(f"{known.path} does not match its checksum")
    except OSError as error:  # from the disk
        raise InvalidCheckpoint(f"{known.path} cannot be read: {error.strerror}") from error


def mended(path: Path, mend: Mend | None) -> Checkpoint:
    """Verify a checkpoint; if it is damaged, repair it and verify it again.

    Raises InvalidCheckpoint; NotFetched if its object store cannot be reached.
    """
    try:
        return verify(path)
    except InvalidCheckpoint as reason:
        if mend is None or (path / _VOID).exists():
            raise
        try:
            mend(path, lambda content: _files(_checked(content, path)))
        except Unreachable as error:
            raise NotFetched(f"{reason}; its object store cannot be reached ({error})") from error
        except InvalidCheckpoint as error:
            raise InvalidCheckpoint(f"{reason}; in its object store, {error}") from error
    return verify(path)


def newest(
    checkpoints: Path,
    mend: Mend | None = None,
    but: Set[int] = frozenset(),
    saved: Set[int] = frozenset(),
) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and those passed over with the reasons; see `mended`.

    Args:
        but: steps whose checkpoints are ignored.
        saved: steps whose checkpoints were completed; with `mend`, they are looked for even if there is
            nothing of them here.

    Raises Unreachable if the object store, which may have a newer one, cannot be reached: it must not be
    passed over, because continuing from an older one makes it void.
    """
    passed_over: list[str] = []
    missing = {folder(checkpoints, step) for step in saved} if mend is not None else set[Path]()
    for path in sorted({*folders(checkpoints), *missing}, key=step_of, reverse=True):
        if step_of(path) in but:
            continue
        complete = step_of(path) in saved or (path / NAME).exists()
        try:
            return mended(path, mend), passed_over
        except NotFetched as reason:
            if complete:
                raise Unreachable(
                    f"the checkpoint of step {step_of(path)} cannot be used: {reason}. Start the run again "
                    "when the store can be reached: it continues from this checkpoint"
                ) from reason
            passed_over.append(f"{path.name}: {reason}")
        except InvalidCheckpoint as reason:
            if path.exists():
                passed_over.append(f"{path.name}: {reason}")
    return None, passed_over


def void(path: Path) -> None:
    """Invalidate a checkpoint because the run continues from an earlier one. Nothing is deleted yet."""
    with contextlib.suppress(FileNotFoundError):
        (path / NAME).rename(path / _VOID)
        storage.sync_directory(path)


def best(checkpoints: Path, metric: str, goal: Goal) -> Path | None:
    """The committed checkpoint with the best value of a metric, the earliest of equal ones, or None."""
    values: dict[Path, float] = {}
    for path in committed(checkpoints):
        with contextlib.suppress(InvalidCheckpoint):
            value = metrics(path).get(metric)
            if value is not None:
                values[path] = value
    pick = min if goal == "min" else max
    return pick(values, key=lambda path: values[path], default=None)


def metrics(path: Path) -> dict[str, float]:
    """The newest value of every metric when a checkpoint was saved. Raises InvalidCheckpoint."""
    found: dict[str, float] = _read(path).get("metrics", {})
    return found


def says_unfit(error: str) -> bool:
    """Whether the text of an error is that of `state.load` for a checkpoint of another model or optimizer."""
    return _OF_ANOTHER.search(error) is not None


def prune(
    checkpoints: Path,
    keep: int,
    also: Path | None = None,
    every: int | None = None,
    ours: Callable[[], None] = lambda: None,
) -> None:
    """Delete old checkpoints, and unfinished saves older than the newest checkpoint.

    Args:
        keep: the number of newest committed checkpoints to keep.
        also: another checkpoint to keep.
        every: keep checkpoints whose step is a multiple of this.
        ours: called when it is known what is old, before it is deleted: raises, or ends the process, if
            another machine trains the run. So nothing that the other machine has made is deleted here.
    """
    done = committed(checkpoints)
    stay = {*done[-keep:], also, *(path for path in done if every and step_of(path) % every == 0)}
    newest = step_of(done[-1]) if done else 0
    old = [path for path in folders(checkpoints) if step_of(path) < newest and path not in stay]
    ours()
    for path in old:
        remove(path)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from the name of its directory."""
    return directory.step_of(path.name)


def committed(checkpoints: Path) -> list[Path]:
    """The checkpoints that have a manifest, by step; nothing else is checked."""
    return [path for path in folders(checkpoints) if (path / NAME).is_file()]


def remove(path: Path) -> None:
    """Delete a checkpoint, manifest first, so that it becomes invalid at once. Of a link, only the link."""
    if path.is_symlink():
        path.unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        (path / NAME).unlink()
    shutil.rmtree(path, ignore_errors=True)


def folders(checkpoints: Path) -> list[Path]:
    """Every step directory, finished or not, by step."""
    if not checkpoints.is_dir():
        return []
    found = [(step_of(path), path) for path in checkpoints.iterdir()]
    return [path for step, path in sorted(found) if step >= 0]


def _read(path: Path) -> dict[str, Any]:
    file = path / NAME
    if file.exists() and not file.is_file():
        raise InvalidCheckpoint("its manifest is not a file")
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        if (path / _VOID).exists():
            raise InvalidCheckpoint("it is void: the run continued from an earlier one") from None
        raise InvalidCheckpoint("it has no manifest: saving it did not finish") from None
    except OSError as error:
        raise InvalidCheckpoint(f"its manifest cannot be read: {error}") from error
    return _checked(content, path)


def _checked(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the manifest of the checkpoint in a directory. Raises InvalidCheckpoint."""
    try:
        manifest = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidCheckpoint(f"its manifest cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in _READABLE:
        raise InvalidCheckpoint(f"its manifest is not in format {FORMAT}")
    if ("xxh3" in manifest or manifest["format"] > 2) and manifest.get("xxh3") != _checksum(manifest):
        raise InvalidCheckpoint("its manifest does not match its own checksum")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]
    if wrong or not manifest["files"]:
        raise InvalidCheckpoint(f"its manifest has no {', '.join(wrong or ['files'])}")
    if manifest["step"] != step_of(path):
        raise InvalidCheckpoint(f"its manifest is for step {manifest['step']}")
    return manifest


_KEYS: dict[str, type] = {"step": int, "samples": int, "metrics": dict, "files": list}


def _checksum(manifest: Mapping[str, Any]) -> str:
    """The checksum of everything in a manifest except itself."""
    said = {key: value for key, value in manifest.items() if key != "xxh3"}
    return xxhash.xxh3_128_hexdigest(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))
