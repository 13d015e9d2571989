"""Opens Parquet files for reading."""

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
