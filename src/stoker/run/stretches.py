"""Append-only files in an object store, which cannot append to objects.

Each stretch of a file is a separate object, `folder/file/<first byte>`. A new stretch is merged with those
before it that are no longer than it is, up to 64 MB, so their number grows with the logarithm of the file's
length, and by one for every 64 MB, not with the number of uploads. A file has one writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stoker import storage
from stoker.object_store import Store, Stored

_LONGEST = 2**26  # bytes
_COMPARED = 2**12  # bytes: whole lines with their times


class Stretch(NamedTuple):
    """The bytes of a file from `begin` up to, not including, `end`."""

    begin: int
    end: int


def known(folder: str, there: Mapping[str, Stored]) -> dict[str, list[Stretch]]:
    """The stretches of each file of a folder, by file name, up to the first gap.

    Args:
        there: the objects in the store, by key.
    """
    found: dict[str, list[Stretch]] = {}
    for key in sorted(key for key in there if key.startswith(f"{folder}/")):
        name, _, begin = key.removeprefix(f"{folder}/").rpartition("/")
        if not name or not begin.isdecimal():
            continue
        of_file = found.setdefault(name, [])
        reached = of_file[-1].end if of_file else 0
        if int(begin) <= reached < int(begin) + there[key].size:  # a merged one may not be deleted yet
            of_file.append(Stretch(int(begin), int(begin) + there[key].size))
    return found


def is_same(store: Store, folder: str, file: Path, stretches: Sequence[Stretch]) -> bool:
    """Whether a file agrees with its stretches in the store, in the last bytes that both have.

    If both have the same size, nothing is read.

    Args:
        folder: the folder's full key.

    Raises:
        Unreachable: the store does not answer.
        FileNotFoundError: a stretch is no longer there.
    """
    size, there = file.stat().st_size, stretches[-1].end if stretches else 0
    end = min(size, there)
    if size == there or end == 0:
        return True
    last = next(stretch for stretch in stretches if stretch.begin < end <= stretch.end)
    begin = max(last.begin, end - _COMPARED)
    with file.open("rb") as source:
        source.seek(begin)
        content = source.read(end - begin)
    return content == store.read(key(folder, file.name, last.begin), begin - last.begin, end - last.begin)


def push(
    store: Store, base: str, folder: str, file: Path, stretches: list[Stretch], there: dict[str, Stored]
) -> None:
    """Upload the part of a file that its stretches in the store lack, after flushing the file to disk.

    Without the flush, a power cut could leave more of the file in the store than on disk, and what is written
    later would be appended to that. Raises Unreachable; OSError if the file cannot be flushed.

    Args:
        base: the prefix of the keys of `there`.
        stretches: the stretches of this file, see `known`; the list is updated.
        there: the objects in the store, which is updated.
    """
    end = file.stat().st_size
    begin = stretches[-1].end if stretches else 0
    if end <= begin:
        return
    storage.sync_file(file)
    if not stretches:
        storage.sync_directory(file.parent)
    for first in range(begin, end, _LONGEST):
        last = min(first + _LONGEST, end)
        joined = _to_join(stretches, first, last)
        begin = joined[-1] if joined else first
        with file.open("rb") as source:
            source.seek(begin)
            content = source.read(last - begin)
        store.write(f"{base}/{key(folder, file.name, begin)}", content)
        stretches.append(Stretch(begin, last))
        there[key(folder, file.name, begin)] = Stored(len(content))
        for old in joined[:-1]:  # its content is now in the merged stretch
            store.remove(f"{base}/{key(folder, file.name, old)}")
            there.pop(key(folder, file.name, old), None)


def _to_join(stretches: list[Stretch], begin: int, end: int) -> list[int]:
    """Take what is merged with a new stretch off the list; returns where each begins, the last first."""
    joined = []
    while stretches and begin - stretches[-1].begin <= end - begin and end - stretches[-1].begin <= _LONGEST:
        begin = stretches.pop().begin
        joined.append(begin)
    return joined


def read(store: Store, folder: str, name: str, stretches: Sequence[Stretch], first: int) -> Iterator[bytes]:
    """The content of a file from byte `first` on, stretch by stretch.

    Args:
        folder: the folder's full key.

    Raises:
        FileNotFoundError: a stretch has meanwhile been merged with the one before it.
        Unreachable: the store does not answer.
    """
    for stretch in stretches:
        if stretch.end > first:
            at = max(0, first - stretch.begin)
            yield store.read(key(folder, name, stretch.begin), at, stretch.end - stretch.begin)
            first = stretch.end


def key(folder: str, name: str, begin: int) -> str:
    """The key of the stretch of a file that begins at a byte."""
    return f"{folder}/{name}/{begin:015d}"
