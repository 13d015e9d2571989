"""Files that only grow, in an object store, which cannot append to one.

Each stretch of a file is an object of its own, `folder/file/<first byte>`. One that is brought there is
joined with those before it that are no longer than it is, so there are as many as the digits of the file's
length, not as many as there were pushes. A file has one writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stoker import storage
from stoker.object_store import Store, Stored

_LONGEST = 2**26  # bytes


class Stretch(NamedTuple):
    """From a byte of a file to before another one."""

    begin: int
    end: int


def known(folder: str, there: Mapping[str, Stored]) -> dict[str, list[Stretch]]:
    """The stretches of each file of a folder without gaps, by its name.

    Args:
        there: what the store has, by key.
    """
    found: dict[str, list[Stretch]] = {}
    for key in sorted(key for key in there if key.startswith(f"{folder}/")):
        name, _, begin = key.removeprefix(f"{folder}/").rpartition("/")
        if not name or not begin.isdecimal():
            continue
        of_file = found.setdefault(name, [])
        reached = of_file[-1].end if of_file else 0
        if int(begin) <= reached < int(begin) + there[key].size:  # what was joined is to go yet
            of_file.append(Stretch(int(begin), int(begin) + there[key].size))
    return found


def push(
    store: Store, base: str, folder: str, file: Path, stretches: list[Stretch], there: dict[str, Stored]
) -> None:
    """Bring to the store what a file has more than its stretches there, once it is on the disk here.

    After a power cut the store would have more of it, and what is written then would be joined to that.
    Raises Unreachable; OSError where the disk does not take it.

    Args:
        base: what the keys of `there` are below.
        stretches: of this file, see `known`; those that are joined are taken out of it.
        there: what the store has; is kept up to date.
    """
    end = file.stat().st_size
    begin = stretches[-1].end if stretches else 0
    if end <= begin:
        return
    storage.sync_file(file)
    if not stretches:
        storage.sync_directory(file.parent)
    joined = []
    while stretches and begin - stretches[-1].begin <= end - begin and end - stretches[-1].begin <= _LONGEST:
        begin = stretches.pop().begin
        joined.append(begin)
    with file.open("rb") as source:
        source.seek(begin)
        content = source.read(end - begin)
    store.write(f"{base}/{_key(folder, file.name, begin)}", content)
    there[_key(folder, file.name, begin)] = Stored(len(content))
    for old in joined:
        if old != begin:  # its content is in the one before it now
            store.remove(f"{base}/{_key(folder, file.name, old)}")
            there.pop(_key(folder, file.name, old), None)


def read(store: Store, folder: str, name: str, stretches: Sequence[Stretch], first: int) -> Iterator[bytes]:
    """What a file has from a byte on, stretch by stretch.

    Args:
        folder: with all that its key begins with.

    Raises:
        FileNotFoundError: a stretch was joined with the one before it meanwhile.
        Unreachable: the store does not answer.
    """
    for stretch in stretches:
        if stretch.end > first:
            content = store.read(_key(folder, name, stretch.begin))
            yield content[max(0, first - stretch.begin) :]
            first = max(first, stretch.begin + len(content))


def _key(folder: str, name: str, begin: int) -> str:
    return f"{folder}/{name}/{begin:015d}"
