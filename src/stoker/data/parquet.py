"""Parquet files, opened to be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from stoker.errors import BadInput

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


@contextlib.contextmanager
def opened(source: Path | BinaryIO, where: str) -> Iterator[ParquetFile]:
    """A Parquet file, within a block that reads it.

    Args:
        where: what it is called in messages.

    Raises:
        BadInput: it is none, or what is read of it is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            yield file
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{where} is not a Parquet file: {error}") from error
