"""Text data as chunks: parts of files that can be read independently, without what comes before them.

A chunk of a `.jsonl` or `.txt` file is the lines that begin within a range of its bytes; a chunk of a
`.parquet` file is a row group. A file that can only be read from its beginning (compressed, or a `.json`) is
unpacked into the cache as a whole when one of its chunks is first read. Files can be on this machine, in an
object store, or in a hub dataset.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import object_store, storage, store_urls
from stoker.data import cached, called, compressed, hub_datasets, parquet, records
from stoker.data.documents import Document, Message, chop, content_key
from stoker.data.records import NO_COLUMNS, Columns, Record
from stoker.errors import BadInput
from stoker.object_store import Store

SIZE = 2 * 2**20
"""Maximum bytes per chunk of a file of lines; the approximate size for a file that must be unpacked."""

_TAIL = 2**16  # bytes read at once when looking for the end of a line
_TEXT_DOCUMENT = 2000  # characters, for a text without separators
_BORDER = re.compile(r"\n(?:[ \t\f]*\n){2,}")
_SMALLER = 3  # approximate compression ratio of a text
_AT_ONCE = 16  # files that are asked for their number of row groups at once


@dataclass(frozen=True)
class File:
    """A file in a folder."""

    key: str
    size: int
    """In bytes."""
    tag: str
    """Changes with the content; empty if unknown."""
    chunks: int

    def bounds(self, part: int) -> tuple[int, int]:
        """The start and end byte of a chunk in a file of lines."""
        return part * self.size // self.chunks, (part + 1) * self.size // self.chunks


@dataclass(frozen=True)
class Chunks:
    """The chunks of all files of a folder, in the order of the files' names."""

    folder: str
    """Its URL; for a hub dataset, including the commit that is read."""
    files: tuple[File, ...]
    name: str = ""
    """The id of a hub dataset, which the fingerprint uses: a different commit can have the same files."""
    columns: Columns = field(default_factory=dict, hash=False)
    """See `records.documents`."""

    def __len__(self) -> int:
        return self._ends[-1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(file.chunks for file in self.files))

    @property
    def where(self) -> str:
        """The folder for messages: a path if it is on this machine."""
        return self.folder.removeprefix("file://")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the files, and of what identifies their content."""
        columns = [sorted(self.columns.items())] if self.columns else []
        about = [self.name or self.folder, *((f.key, f.size, f.tag) for f in self.files), *columns]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def kept(self, number: int) -> list[Document]:
        """Like `documents`, for the few chunks that every start looks at: kept in the cache."""
        file = storage.cache_folder() / f"parts-6-{self.fingerprint[:32]}" / f"{number}.json"
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            found = orjson.loads(file.read_bytes())
            return [
                Document(
                    k, p, t, tuple(Message(*m) for m in said), system, tools, values, tuple(unread), where
                )
                for k, p, t, said, system, tools, values, unread, where in found
            ]
        documents = self.documents(number)
        with contextlib.suppress(OSError):  # on failure they are read again
            file.parent.mkdir(parents=True, exist_ok=True)
            about = [
                (d.key, d.prompt, d.text, list(map(tuple, d.messages)), d.system, d.tools, d.template_values,
                 d.unread, d.where)
                for d in documents
            ]  # fmt: skip
            storage.write_atomically(file, orjson.dumps(about))
        return documents

    def documents(self, number: int) -> list[Document]:
        """The documents in a chunk, including those from which nothing can be learnt.

        Raises BadInput if it cannot be read, Unreachable if it cannot be accessed.
        """
        place = bisect.bisect_right(self._ends, number)
        file = self.files[place]
        part = number - (self._ends[place] - file.chunks)
        store, where = Store(self.folder, ""), f"{self.where}/{file.key}"
        try:
            reader = _READERS[compressed.kind(file.key)]
            if compressed.must_be_unpacked(file.key):
                store, file = _unpacked(store, file, where)
            return list(reader(store, file, part, where, self.columns))
        except FileNotFoundError as error:
            raise BadInput(f"{where} has disappeared since the run began") from error


def find(source: str, columns: Columns = NO_COLUMNS) -> Chunks:
    """The chunks of a file, a folder, a URL, or a hub dataset by its id.

    Args:
        columns: see `records.documents`.

    Raises BadInput if the source does not exist or has no readable file.
    """
    folder, keys = _where(source)
    store = Store(folder, "")
    try:
        found = _some(store, folder, keys) if keys else store.objects()
    except PermissionError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror}") from error
    is_data = compressed.kind if keys else compressed.is_data_in_a_folder
    wanted = {key: about for key, about in sorted(found.items()) if is_data(key) and about.size > 0}
    if not wanted and folder.startswith("hf:"):
        raise BadInput(
            f"{source} has {keys[0]}, but streaming reads only a {compressed.ALLOWED}: omit streaming=true"
        )
    if not wanted:
        raise BadInput(f"{source} does not exist, or contains no {compressed.ALLOWED} with text")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        counts = pool.map(lambda pair: _count(store, pair[0], pair[1].size), wanted.items())
        files = [
            File(key, about.size, about.tag, count)
            for (key, about), count in zip(wanted.items(), counts, strict=True)
        ]
    return Chunks(folder, tuple(files), source if folder.startswith("hf:") else "", dict(columns))


def texts(content: str) -> Iterator[Document]:
    """The documents of a text, separated by two or more blank lines; otherwise pieces of a certain length."""
    parts = _BORDER.split(content.replace("\r\n", "\n"))
    if len(parts) < 3:  # hardly any separators
        parts = chop(content.replace("\r\n", "\n"), _TEXT_DOCUMENT)
    for part in parts:
        if part.strip():
            yield Document(content_key(part), "", part.strip("\n"))


def _where(source: str) -> tuple[str, list[str]]:
    """The URL of a folder, and the files in it that are meant, or none for all files."""
    if store_urls.is_url(source):
        store_urls.check(source, written=False)
        folder, _, last = source.rstrip("/").rpartition("/")
        return (folder, [last]) if compressed.kind(last) else (source.rstrip("/"), [])
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return f"file://{path}", []
    if path.exists() or hub_datasets.is_a_file_name(source):
        return f"file://{path.parent}", [path.name]
    hub_datasets.check(source)
    return hub_datasets.files(source)


def _some(store: Store, folder: str, keys: list[str]) -> dict[str, object_store.Stored]:
    if folder.startswith("file:"):
        files = {key: Path(folder.removeprefix("file://")) / key for key in keys}
        abouts = {key: file.stat() for key, file in files.items() if file.is_file()}
        return {
            key: object_store.Stored(about.st_size, str(storage.modified(files[key])))
            for key, about in abouts.items()
        }
    meant = set(keys)
    return {key: about for key, about in store.objects().items() if key in meant}


def _count(store: Store, key: str, size: int) -> int:
    if compressed.kind(key) != ".parquet":
        return -(-size * (_SMALLER if compressed.is_compressed(key) else 1) // SIZE)
    with parquet.opened(_file(store, key, size), f"{store.url}/{key}") as file:
        return int(file.num_row_groups)


def _unpacked(store: Store, file: File, where: str) -> tuple[Store, File]:
    """A file that can only be read from its beginning, as a file of lines in the cache. Raises BadInput."""
    named = cached.name(store.url, file.key, file.size, file.tag)
    target = storage.cache_folder() / "unpacked" / named

    def fill(made: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
            packed = Path(scratch) / "packed"
            try:
                store.get(file.key, packed)
            except FileNotFoundError as error:
                raise BadInput(f"{where} has disappeared since the run began") from error
            with made.open("wb") as out:
                out.writelines(compressed.lines(packed, file.key, where))
        storage.sync_file(made)

    cached.once(target, fill)
    return Store(f"file://{target.parent}", ""), File(named, target.stat().st_size, "", file.chunks)


def _read_jsonl(store: Store, file: File, part: int, where: str, columns: Columns) -> Iterator[Document]:
    def parsed() -> Iterator[Record]:
        at, _ = file.bounds(part)
        for number, raw in enumerate(_lines(store, file, part).split(b"\n"), start=1):
            place = f"{where}, {compressed.unit(where)} {number}" + (
                f" of those that start after byte {at}" if at else ""
            )
            yield from records.from_json(raw, place)

    yield from records.documents(parsed(), columns)


def _read_txt(store: Store, file: File, part: int, where: str, columns: Columns) -> Iterator[Document]:
    yield from texts(records.decode(_lines(store, file, part), where))


def _read_parquet(store: Store, file: File, part: int, where: str, columns: Columns) -> Iterator[Document]:
    with parquet.opened(_file(store, file.key, file.size), where) as opened:
        rows = map(called.of_a_column, opened.read_row_group(part).to_pylist())
    places = (f"{where}, row {number} of row group {part + 1}" for number in itertools.count(1))
    yield from records.documents(zip(places, rows, strict=False), columns)


_READERS: dict[str, Callable[[Store, File, int, str, Columns], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_jsonl,
    ".tsv": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _lines(store: Store, file: File, part: int) -> bytes:
    """The lines that begin in a part of a file: each line belongs to exactly one part."""
    first, last = file.bounds(part)
    if first == last:
        return b""
    content = store.read(file.key, max(0, first - 1), last)
    if first:
        content = content[content.find(b"\n") + 1 :] if b"\n" in content else b""
    while content and last < file.size and not content.endswith(b"\n"):
        more = store.read(file.key, last, min(file.size, last + _TAIL))
        last += len(more)
        content += more[: more.find(b"\n") + 1] if b"\n" in more else more
    return content


def _file(store: Store, key: str, size: int) -> io.BufferedReader:
    return io.BufferedReader(_Ranges(store, key, size), buffer_size=2**16)


class _Ranges(io.RawIOBase):
    """A file in a store, of which only what is read is downloaded."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size = store, key, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        found = self._store.read(self._key, self._at, self._at + wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
