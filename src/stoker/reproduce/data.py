"""The data that a run reads, identified by its content: `data.json`.

The fingerprint of a file or folder is XXH3 (128 bits, https://xxhash.com) over every file's relative path,
size and content, in the order of the paths; the location of the data does not matter. Beyond a size limit,
only evenly spaced blocks are read, over all files as if they were one: other changes that keep all sizes
are not detected, and the record says `sampled`.

A fingerprint is remembered in the user's cache as long as no file's size, modification time or inode
differs, so that the next start reads nothing.
"""

from __future__ import annotations

import bisect
import itertools
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash
from stoker import redaction, storage

WHOLE = 2**30
"""Bytes up to which all content is read."""

_BLOCKS, _BLOCK = 1024, 2**16  # what is read of larger data: 64 MiB
_PIECE = 2**20  # bytes read at once
_YOUNG = 2.0  # seconds in which a second change can leave a file's time unchanged, on a coarse clock

How = Literal["content", "sampled"]


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the content of data."""

    fingerprint: str
    """`xxh3:` and 32 hexadecimal digits."""
    bytes: int
    files: int
    how: How


@dataclass(frozen=True)
class _File:
    """A file of the data: its relative path, empty for a single file, and its metadata."""

    name: str
    path: str
    size: int
    changed: int
    inode: int


def fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a file, or of all files in a folder, following links.

    Raises:
        OSError: `path` does not exist, or a file cannot be read.
    """
    files = _files(path)
    state = _state(files)
    memory = (
        storage.cache_folder() / "data" / f"{xxhash.xxh3_128_hexdigest(os.fsencode(path.absolute()))}.json"
    )
    known = storage.read_json(memory)
    if known.get("state") == state:
        return Fingerprint(**known["fingerprint"])
    found = _read(files)
    if time.time() - max((file.changed for file in files), default=0) / 1e9 > _YOUNG:
        storage.try_to_write_json(memory, {"state": state, "fingerprint": vars(found)})
    return found


def describe(reference: str, known: str = "", revision: str = "", part: str = "") -> dict[str, Any]:
    """The entry of a dataset in `data.json`.

    Args:
        reference: a path as it was given, or another name of data: a hub id, a URL, a word.
        known: the fingerprint of its content, if it is not a path.
        revision: for a hub dataset, the commit.
        part: what of a folder is read, relative to it; the fingerprint is that of the part.

    Raises:
        OSError: it must be a path, and cannot be read.
    """
    if known or revision:
        given = {"fingerprint": known, "revision": revision, "how": "content"}
        return {"path": redaction.text(reference), **{key: value for key, value in given.items() if value}}
    path = Path(reference).expanduser()
    read = {"part": part} if part else {}
    return {"path": reference, "absolute": str(path.absolute()), **read, **vars(fingerprint(path / part))}


def read_at(path: Path, about: Mapping[str, Any]) -> Path:
    """What is read of recorded data that is at a path."""
    return path / str(about.get("part", ""))


def identity(about: Mapping[str, Any]) -> str:
    """What identifies the content of recorded data: its fingerprint, or else a hub dataset's revision."""
    return str(about.get("fingerprint") or about.get("revision", ""))


def record(file: Path, name: str, about: dict[str, Any], attempt: int) -> str | None:
    """Record a dataset in `data.json`; returns its previous fingerprint or revision, if that differs.

    The record of the first attempt that read it is kept; that of a later attempt is added to it.

    Args:
        file: `data.json`, created if needed.
        about: from `describe`.
    """
    known = storage.read_json(file)
    first = known.setdefault(name, about)
    now, before = identity(about), identity(first)
    changed = first.get("changed", [])
    if now != (changed[-1]["fingerprint"] if changed else before):
        first["changed"] = [*changed, {"attempt": attempt, "fingerprint": now}]
    storage.write_atomically(file, orjson.dumps(known, option=orjson.OPT_INDENT_2))
    return before if now != before else None


def _files(path: Path) -> list[_File]:
    """All files, in the order of their names within the folder."""
    if not path.is_dir():
        return [_file("", str(path), path.stat())]
    found = []
    for entry in storage.walk(path):
        status = entry.stat()
        if stat.S_ISREG(status.st_mode):
            found.append(_file(os.path.relpath(entry.path, path), entry.path, status))
    return sorted(found, key=lambda file: file.name)


def _file(name: str, path: str, status: os.stat_result) -> _File:
    return _File(name, path, status.st_size, status.st_mtime_ns, status.st_ino)


def _state(files: Sequence[_File]) -> str:
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(
            f"{file.name}\0{file.size} {file.changed} {file.inode}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _read(files: Sequence[_File]) -> Fingerprint:
    total = sum(file.size for file in files)
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode(errors="surrogateescape"))
    how: How = "content" if total <= WHOLE else "sampled"
    if how == "content":
        for file in files:
            _add_whole(digest, file)
    else:
        _add_blocks(digest, files, total)
    return Fingerprint(f"xxh3:{digest.hexdigest()}", total, len(files), how)


def _add_whole(digest: xxhash.xxh3_128, file: _File) -> None:
    with open(file.path, "rb", buffering=0) as opened:  # noqa: PTH123
        while piece := opened.read(_PIECE):
            digest.update(piece)


def _add_blocks(digest: xxhash.xxh3_128, files: Sequence[_File], total: int) -> None:
    """The blocks at evenly spaced positions over all bytes; a block ends where its file does."""
    ends = list(itertools.accumulate(file.size for file in files))
    for number in range(_BLOCKS):
        at = number * (total - 1) // (_BLOCKS - 1)
        of = bisect.bisect_right(ends, at)
        with open(files[of].path, "rb", buffering=0) as opened:  # noqa: PTH123
            opened.seek(at - ends[of] + files[of].size)
            digest.update(opened.read(_BLOCK))
