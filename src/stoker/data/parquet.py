"""Opens Parquet files for reading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from stoker.errors import BadInput

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile


@contextlib.contextmanager
def opened(source: Path | BinaryIO, where: str) -> Iterator[ParquetFile]:
    """A Parquet file, open within this block.

    Args:
        where: its name in messages.

    Raises:
        BadInput: it is not a Parquet file, or what is read is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            yield file
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{where} is not a Parquet file: {error}") from error
    except OSError as error:
        if not isinstance(source, Path):  # then it says that a store does not answer
            raise
        raise BadInput(f"{where} cannot be read: {error.strerror or error}") from error


def class_names(schema: Schema, column: str) -> Sequence[str]:
    """The names of a label column's numbers, if `datasets` has written them into the file."""
    if b"huggingface" not in (schema.metadata or {}):
        return ()
    from datasets import Features

    return getattr(Features.from_arrow_schema(schema).get(column), "names", None) or ()
