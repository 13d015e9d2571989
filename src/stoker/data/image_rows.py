"""Images in Parquet files.

Rows of a Parquet group cannot be read separately, so the images are copied once, with their labels, into an
Arrow file in the cache, which is memory-mapped. It belongs to these files as they are: one that is written
anew is copied anew, also if its size and its modification time are the same.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from stoker import storage
from stoker.data import cached, image_source, labelled, parquet
from stoker.data.image_source import Columns, Numbers, Source
from stoker.errors import BadInput
from stoker.words import size

log = logging.getLogger("stoker")

FORMAT = 2
"""Part of the name in the cache: increase it when the copy of the same files changes."""

_ROWS = 128  # copied together
_LARGE = 2**30  # bytes whose copying is announced


@dataclass
class _Rows:
    """Rows of a memory-mapped Arrow file, each of which can be read separately."""

    copy: Path
    files: list[tuple[int, Path]]
    """First row and file, in order."""
    labels: Numbers
    classes: tuple[str, ...]
    fingerprint: str
    given: dict[str, Numbers]
    left_out: tuple[str, ...]

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file itself, and copies nothing.
        return {name: value for name, value in vars(self).items() if name != "_images"}

    @functools.cached_property
    def _images(self) -> Any:
        return _mapped(self.copy).column("image")

    def raw(self, index: int) -> bytes:
        found: bytes = self._images[index].as_py()
        return found

    def place(self, index: int) -> str:
        first, file = max(pair for pair in self.files if pair[0] <= index)
        return f"{file}, row {index - first}"

    def names(self) -> Iterator[str]:
        """Hashes of the images' bytes: equal images are in the same split."""
        return map(str, _mapped(self.copy).column("key").to_numpy().tolist())


def read(files: Sequence[Path], columns: Columns, others: Sequence[Path]) -> Source:
    """The rows of Parquet files.

    A split of a hub dataset whose labels are withheld (all -1) is left out.

    Args:
        others: files next to them that are not read.

    Raises:
        BadInput: a column does not exist, a row has no image or no label, or a file cannot be read.
    """
    splits = labelled.splits_of(files)
    folder = storage.cache_folder() / "images" / cached.name(FORMAT, columns, splits, _state(files))
    copy = folder / "rows.arrow"
    table = cached.opened(
        folder, lambda made: _copy(files, splits, columns, made, folder), lambda made: _mapped(copy)
    )
    about = json.loads(table.schema.metadata[b"stoker"])
    names = table.column("label").to_pylist()
    labelled_rows = [n for n, name in enumerate(names) if name is not None]
    found = [names[n] for n in labelled_rows]
    classes = tuple(about["classes"]) or image_source.classes_of(found)
    numbers = np.full(len(names), -1, np.int64)
    numbers[labelled_rows] = image_source.numbered(found, classes)
    of = np.repeat(splits, about["rows"])
    given = image_source.given(of.tolist())
    given = {name: those for name, those in given.items() if (numbers[those] >= 0).any()}
    withheld = sorted({str(name) for name in of[numbers < 0]})
    left_out = [f"the {name} split, whose labels are withheld" for name in withheld]
    starts = itertools.accumulate(about["rows"], initial=0)
    keys: bytes = table.column("key").to_numpy().tobytes()
    return _Rows(
        copy, list(zip(starts, files, strict=False)), numbers, classes,
        image_source.digest(keys, "\n".join(name or "" for name in names).encode()), given,
        (*image_source.by_ending(others), *left_out),
    )  # fmt: skip


def _state(files: Sequence[Path]) -> list[tuple[str, int, int, int, int]]:
    """What differs once a file has been replaced or written to: the latter's time cannot be set."""
    found = []
    for file in files:
        now = file.stat()
        found.append((str(file.resolve()), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino))
    return found


def _mapped(file: Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def _copy(files: Sequence[Path], splits: Sequence[str], columns: Columns, made: Path, folder: Path) -> None:
    """Write images, labels (null where withheld) and keys into a new folder. Raises BadInput.

    Args:
        folder: what it will be called once it is complete.
    """
    import pyarrow

    before = _state(files)
    labels, classes = _labels(files, splits, columns)
    total = sum(file.stat().st_size for file in files)
    if total > _LARGE:
        log.info("data: copying images from Parquet to %s once (%s)", folder, size(total))
    about = {"classes": classes, "rows": [len(some) for some in labels]}
    schema = pyarrow.schema(
        {"image": pyarrow.large_binary(), "label": pyarrow.string(), "key": pyarrow.uint64()},
        metadata={"stoker": json.dumps(about)},
    )
    made.mkdir()
    copy = made / "rows.arrow"
    with pyarrow.OSFile(str(copy), "wb") as target, pyarrow.ipc.new_file(target, schema) as written:
        for file, of in zip(files, labels, strict=True):
            begin = 0
            for images in _images(file, columns.image):
                keys = np.array([xxhash.xxh3_64_intdigest(image) for image in images], np.uint64)
                some = of[begin : begin + len(images)]
                batch = {"image": images, "label": some, "key": keys}
                written.write_batch(pyarrow.RecordBatch.from_pydict(batch, schema=schema))
                begin += len(images)
    if _state(files) != before:
        raise BadInput(f"{files[0].parent}: the Parquet files changed while they were read: start again")
    storage.sync_file(copy)


def _labels(
    files: Sequence[Path], splits: Sequence[str], columns: Columns
) -> tuple[list[list[str | None]], list[str]]:
    """The labels of each file's rows, None where withheld, and the classes if the files name them."""
    values: list[list[Any]] = []
    named: list[Sequence[str]] = []
    for file in files:
        with parquet.opened(file, str(file)) as opened:
            wanted = {"label_column": columns.label, "image_column": columns.image}
            labelled.check_columns(str(file), wanted, opened.schema_arrow.names)
            named.append(parquet.class_names(opened.schema_arrow, columns.label))
            values.append(opened.read(columns=[columns.label]).column(columns.label).to_pylist())
    classes = list(dict.fromkeys(itertools.chain.from_iterable(named)))
    withheld = {
        split
        for split in set(splits) - {"train", ""}
        if classes
        and all(v == -1 for some, s in zip(values, splits, strict=True) if s == split for v in some)
    }
    found: list[list[str | None]] = []
    for file, split, some, own in zip(files, splits, values, named, strict=True):
        if split in withheld:
            found.append([None] * len(some))
            continue
        names = own or classes  # each file numbers its classes itself
        found.append(
            [labelled.label_of(f"{file}, row {n}", v, columns.label, names) for n, v in enumerate(some)]
        )
    return found, classes


def _images(file: Path, column: str) -> Iterator[list[bytes]]:
    """The bytes of the images in batches of rows. Raises BadInput."""
    number = itertools.count()
    with parquet.opened(file, str(file)) as opened:
        for batch in opened.iter_batches(batch_size=_ROWS, columns=[column]):
            cells = batch.column(0).to_pylist()
            yield [_bytes(cell, f"{file}, row {next(number)}", column) for cell in cells]


def _bytes(cell: Any, where: str, column: str) -> bytes:
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(found, bytes):
        return found
    path = cell.get("path") if isinstance(cell, dict) else cell
    only = f", only the path {os.fspath(path)}" if isinstance(path, str) and path else ""
    raise BadInput(
        f"{where}: {column!r} contains no image bytes{only}: write the bytes of the images into the file, or "
        "give a folder with one folder of images per class"
    )
