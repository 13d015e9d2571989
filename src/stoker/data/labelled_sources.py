"""Reads labelled texts: the built-in ones, local files, hub datasets.

A record has a text and a label, in two named columns. Input that cannot be read is refused with the file, the
line and what was expected.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import store_urls
from stoker.data import hub_datasets, parquet, python_parts, records
from stoker.data.documents import content_key
from stoker.data.labelled import (
    SPLITS,
    NoColumn,
    Text,
    Texts,
    check_columns,
    divided,
    files_in,
    label_of,
    splits_of,
)
from stoker.data.records import Record
from stoker.errors import BadInput, nearest

BUILT_IN: dict[str, Callable[[], list[Text]]] = {"python-docstrings": python_parts.texts}

_MANY = sys.maxsize  # characters per field of a CSV file


@dataclass(frozen=True)
class Columns:
    """The names of a record's text and label columns."""

    text: str
    label: str

    @functools.cached_property
    def by_key(self) -> dict[str, str]:
        """The columns by the keys of the config that give them."""
        return {"text_column": self.text, "label_column": self.label}


def check(data: str) -> None:
    """Raises BadInput if the data does not exist, before any of it is read."""
    if data in BUILT_IN or Path(data).expanduser().exists():
        return
    if store_urls.is_url(data):
        raise BadInput(f"data={data}: labelled texts are read from local files: copy it to a folder first")
    if hub_datasets.is_a_file_name(data):
        raise BadInput(f"data={data} does not exist{nearest(data, BUILT_IN)}")
    hub_datasets.check(data, tuple(BUILT_IN))


def is_here(data: str) -> bool:
    """Whether the data consists of local files."""
    return data not in BUILT_IN and Path(data).expanduser().exists()


def read(data: str, columns: Columns, *, validation: float, test: float) -> Texts:
    """The texts of `python-docstrings`, a .jsonl, .csv or .parquet file, a folder of these, or the hub.

    Files of a folder can belong to splits, as in `train.csv`, `test-00000.parquet` or `validation/a.jsonl`.
    Blank texts are left out.

    Args:
        validation, test: the shares to hold out if the data has no such split.

    Raises:
        BadInput: it does not exist, cannot be read, or cannot be learnt from; see `labelled.divided`.
    """
    check(data)
    if data in BUILT_IN:
        given = {"train": BUILT_IN[data]()}
        about = python_parts.describe()
    else:
        path = Path(data).expanduser()
        by_split = _of_files(path, columns) if path.exists() else of_hub(data, columns)
        read_in = {name: list(texts) for name, texts in by_split.items()}
        given = {name: [t for t in texts if t.text.strip()] for name, texts in read_in.items()}
        about = _described(path.name if path.exists() else f"hub dataset {data}", read_in, given)
    return divided(given, validation=validation, test=test, description=about)


def _described(name: str, read_in: dict[str, list[Text]], given: dict[str, list[Text]]) -> str:
    count = sum(map(len, given.values()))
    if count == 0:
        raise BadInput(f"{name} is an empty dataset: it contains no text")
    blank = sum(map(len, read_in.values())) - count
    return f"{name}, {count:,} texts" + (f" ({blank:,} blank ones are left out)" if blank else "")


# -- files ------------------------------------------------------------------------------------


def _of_files(path: Path, columns: Columns) -> dict[str, Iterable[Text]]:
    if path.is_file():
        return {"train": _of_file(path, columns)}
    files = [file for file in files_in(path) if file.suffix.lower() in _READERS]
    if not files:
        raise BadInput(f"{path} is a folder without a {_ENDINGS} file")
    splits = splits_of(files)
    of = {name: [f for f, s in zip(files, splits, strict=True) if s == name] for name in set(splits)}
    # Train first: if its files have the columns, a test file without labels was meant to be predicted.
    return {name: _of_split(name, of[name], columns) for name in sorted(of, key=lambda name: name != "train")}


def _of_split(split: str, files: Sequence[Path], columns: Columns) -> Iterator[Text]:
    for file in files:
        texts = _of_file(file, columns)
        try:
            first = list(itertools.islice(texts, 1))
        except NoColumn as error:
            if split == "train" or error.key != "label_column":
                raise
            raise BadInput(
                f"{file} has no labels (no column {columns.label!r}), so nothing can be measured on it: move "
                "it elsewhere, and texts are held out instead"
            ) from error
        yield from itertools.chain(first, texts)


def _of_file(path: Path, columns: Columns) -> Iterator[Text]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} has an unknown file extension: give a {_ENDINGS} file")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error


def _of_jsonl(path: Path, columns: Columns) -> Iterator[Text]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            for where, record in records.from_json(line, f"{path}, line {number}"):
                if not isinstance(record, dict):
                    raise BadInput(f"{where}: a record must be a JSON object, not {records.kind_of(record)}")
                yield _text(where, record, columns)


def _of_csv(path: Path, columns: Columns) -> Iterator[Text]:
    csv.field_size_limit(_MANY)
    text = io.StringIO(records.decode(path.read_bytes(), str(path)), newline="")
    rows = csv.DictReader(text, strict=True)
    try:
        for row in rows:
            if None in row:
                raise BadInput(
                    f"{path}, line {rows.line_num}: more fields than the header line names; put a field with "
                    "a comma in quotes"
                )
            yield _text(f"{path}, line {rows.line_num}", row, columns)
    except csv.Error as error:
        raise BadInput(f"{path}, line {rows.line_num}: not valid CSV: {error}") from error


def _of_parquet(path: Path, columns: Columns) -> Iterator[Text]:
    with parquet.opened(path, str(path)) as file:
        check_columns(str(path), columns.by_key, file.schema_arrow.names)
        classes = parquet.class_names(file.schema_arrow, columns.label)
        number = itertools.count(1)
        for batch in file.iter_batches(columns=[columns.text, columns.label]):
            for row in batch.to_pylist():
                yield _text(f"{path}, row {next(number)}", row, columns, classes)


_READERS: dict[str, Callable[[Path, Columns], Iterator[Text]]] = {
    ".jsonl": _of_jsonl,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
_ENDINGS = ".jsonl, .csv or .parquet"


# -- hub --------------------------------------------------------------------------------------


def of_hub(name: str, columns: Columns) -> dict[str, Iterable[Text]]:
    """The splits of a hub dataset, except those whose labels are withheld (all -1)."""
    found: dict[str, Iterable[Text]] = {}
    for split, rows in hub_datasets.splits(name, tuple(BUILT_IN)).items():
        if SPLITS.get(split, split) in found or split not in SPLITS:  # the first of, say, validation and dev
            continue
        classes = getattr(rows.features.get(columns.label), "names", None) or ()
        if classes and set(rows.unique(columns.label)) == {-1}:
            continue
        where = f"{name}, {split}, row "
        numbered: Iterator[Record] = ((f"{where}{n}", row) for n, row in enumerate(rows, start=1))
        found[SPLITS[split]] = [_text(at, row, columns, classes) for at, row in numbered]
    return found


# -- records ----------------------------------------------------------------------------------


def _text(where: str, record: dict[str, Any], columns: Columns, classes: Sequence[str] = ()) -> Text:
    check_columns(where, columns.by_key, record)
    text = record[columns.text]
    if not isinstance(text, str):
        raise BadInput(f"{where}: {columns.text!r} must be a string, not {records.kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise BadInput(f"{where}: {columns.text!r} is not valid Unicode: {error.reason}") from error
    return Text(text, label_of(where, record[columns.label], columns.label, classes), content_key(text))
