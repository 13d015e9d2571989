"""The kinds of text data files, by name, and files that can only be read from their beginning.

These are compressed files; `.json` files, which contain one array of records or one record per line; and
`.csv` or `.tsv` files, whose first line names the fields of the records.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from stoker.errors import BadInput

ALLOWED = ".jsonl, .json, .csv, .tsv, .txt or .parquet file (or .jsonl.gz, .jsonl.zst and the like)"
"""The allowed kinds of text data files, for messages."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OF_RECORDS = (".json", *_DELIMITERS)
_KINDS = (".jsonl", ".txt", ".parquet", *_OF_RECORDS)
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 2**20  # bytes
_LONGEST_FIELD = 2**31 - 1


def kind(name: str) -> str:
    """The extension of a file, in lower case, without that of a compression; empty for other files."""
    path = Path(name.lower())
    inner = Path(path.stem).suffix if path.suffix in _CODECS else path.suffix
    return inner if inner in _KINDS and (inner == path.suffix or inner != ".parquet") else ""


def is_data_in_a_folder(name: str) -> bool:
    """Whether to read a file of a folder as data: a plain .json more often describes the data."""
    return kind(name) != "" and not name.lower().endswith(".json")


def is_compressed(name: str) -> bool:
    return name.lower().endswith(tuple(_CODECS))


def must_be_unpacked(name: str) -> bool:
    """Whether a data file has no lines that can be read without what comes before them."""
    return is_compressed(name) or kind(name) in _OF_RECORDS


def unit(name: str) -> str:
    """The unit in which the lines of a file are counted once it is a file of lines."""
    return "record" if kind(name) in _OF_RECORDS else "line"


def lines(file: Path, name: str, where: str) -> Iterator[bytes]:
    """The content of a file as lines, in pieces, with one line per record of an array or table.

    Args:
        name: its original name.
        where: its name in messages.

    Raises:
        BadInput: it is damaged, or not valid JSON or CSV.
        FileNotFoundError: it does not exist.
    """
    if kind(name) in _DELIMITERS:
        for row in _rows(file, name, where):
            yield json.dumps(row).encode() + b"\n"
        return
    pieces = _blocks(file, name, where)
    if kind(name) != ".json":
        yield from pieces
        return
    first = next(pieces, b"")
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from itertools.chain([first], pieces)
        return
    for record in _array(b"".join([first, *pieces]), where):
        yield json.dumps(record).encode() + b"\n"


def _blocks(file: Path, name: str, where: str) -> Iterator[bytes]:
    with _opened(file, name) as stream:
        while True:
            try:
                piece = stream.read(_BLOCK)
            except OSError as error:
                raise BadInput(f"{where} cannot be decompressed: {error}") from error
            if not piece:
                return
            yield piece


@contextlib.contextmanager
def _opened(file: Path, name: str) -> Iterator[IO[bytes]]:
    import pyarrow

    codec = _CODECS.get(Path(name).suffix.lower())
    with file.open("rb") as raw:
        yield io.BufferedReader(pyarrow.CompressedInputStream(raw, codec)) if codec else raw


def _array(content: bytes, where: str) -> list[object]:
    try:
        found: list[object] = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 at offset {error.start}; convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BadInput(f"{where}: not JSON: {error.msg} ({place})") from error
    except RecursionError as error:
        raise BadInput(f"{where}: not usable JSON: nested too deeply") from error
    return found


def _rows(file: Path, name: str, where: str) -> Iterator[dict[str, str]]:
    """The rows of a table, read lazily; the first line names the fields."""
    csv.field_size_limit(_LONGEST_FIELD)
    number = 0
    with _opened(file, name) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter=_DELIMITERS[kind(name)], strict=True)
        try:
            for number, row in enumerate(rows, start=1):
                if None in row:
                    raise BadInput(f"{where}, record {number}: more fields than the header line names")
                yield {field: value for field, value in row.items() if value is not None}
        except csv.Error as error:
            raise BadInput(f"{where}, line {rows.line_num}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: not UTF-8 after record {number}; convert the file to UTF-8") from error
        except OSError as error:
            raise BadInput(f"{where} cannot be decompressed: {error}") from error


def split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of content that comes in pieces."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    yield rest
