"""Logged media: tables, figures, images and texts as files, histograms as numbers.

A file is stored as artifacts/<kind>s/<name>/step-00000500.<suffix> and described in the journal. Matplotlib,
Plotly, pandas and torch are never imported, and Pillow only for images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stoker import redaction, storage
from stoker.run import artifacts
from stoker.run.directory import RunDirectory
from stoker.run.values import encodable

FOLDERS = {"table": "tables", "figure": "figures", "image": "images", "text": "texts"}
"""The folder of each kind, below the run's artifacts."""
_CHANNELS = (1, 3, 4)
_SLIGHTLY = 0.02


@dataclass(frozen=True)
class Encoded:
    """A file's content, its suffix, and its description for the journal."""

    content: bytes
    suffix: str
    about: dict[str, Any]


def write(directory: RunDirectory, kind: str, name: str, step: int, encoded: Encoded) -> dict[str, Any]:
    """Write the file; returns its path from the run's directory, size and SHA-256.

    A file already written at this step is never changed: different content gets another name.
    """
    directory.check_is_there()
    folder = directory.artifacts / FOLDERS[kind] / artifacts.checked_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{step:08d}{encoded.suffix}"
    count = 1
    while file.exists() and file.read_bytes() != encoded.content:
        count += 1
        file = folder / f"step-{step:08d}.{count}{encoded.suffix}"
    storage.write_atomically(file, encoded.content)
    return artifacts.describe(directory, file)[0]


def table(rows: Any, columns: Sequence[str] | None) -> Encoded:
    """A table as Parquet.

    Args:
        rows: a list of dicts, a list of rows with `columns`, a dict of columns, or a table of
            pandas, Polars or Arrow.
        columns: the names of the columns, or a selection of columns in the wanted order.

    Raises:
        ValueError, TypeError: the length of a row differs from that of `columns`, or a column mixes types.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = _without_secrets(_arrow(rows, columns))
    except UnicodeEncodeError:
        found = _without_secrets(_arrow(encodable(rows), encodable(columns)))
    sink = pa.BufferOutputStream()
    parquet.write_table(found, sink, compression="zstd")
    about = {"columns": found.column_names, "rows": found.num_rows}
    return Encoded(sink.getvalue().to_pybytes(), ".parquet", about)


def figure(drawn: Any) -> Encoded:
    """A Matplotlib figure as PNG (150 dots per inch), a Plotly figure as JSON. Raises TypeError."""
    if hasattr(drawn, "to_plotly_json"):
        return Encoded(redaction.text(drawn.to_json()).encode(), ".plotly.json", {})
    if hasattr(drawn, "savefig"):
        sink = io.BytesIO()
        drawn.savefig(sink, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        return Encoded(sink.getvalue(), ".png", {})
    raise TypeError(f"a figure must be from Matplotlib or Plotly, not {type(drawn).__name__}")


def image(picture: Any, caption: str | None) -> Encoded:
    """An image as PNG.

    Args:
        picture: a Pillow image; or an array or tensor, (height, width), (height, width,
            channels) or (channels, height, width), of uint8, or of floats from 0 to 1.
    """
    from PIL import Image

    drawn = picture if isinstance(picture, Image.Image) else Image.fromarray(_pixels(_array(picture)))
    sink = io.BytesIO()
    drawn.save(sink, format="PNG")
    about = {"width": drawn.width, "height": drawn.height}
    return Encoded(sink.getvalue(), ".png", {**about, "caption": caption} if caption else about)


def beyond(picture: Any) -> tuple[float, float] | None:
    """The lowest and highest of an image's floats, if they are clearly beyond 0 to 1; otherwise None.

    An image that was resized or computed may be beyond by a little.
    """
    if not hasattr(picture, "dtype"):  # one of Pillow's
        return None
    array = _array(picture)
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).any():
        return None
    finite = array[np.isfinite(array)]
    low, high = float(finite.min()), float(finite.max())
    return None if low >= -_SLIGHTLY and high <= 1 + _SLIGHTLY else (low, high)


def text(content: str) -> Encoded:
    """A text as UTF-8, with secrets redacted."""
    return Encoded(redaction.text(content).encode(errors="replace"), ".txt", {})


def histogram(values: Any, bins: int) -> dict[str, Any]:
    """`edges` (bins + 1) and `counts` (bins) of the finite values, and how many were `non_finite`."""
    flat = _array(values).astype(np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    counts, edges = np.histogram(finite, bins=bins)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "non_finite": len(flat) - len(finite)}


def read_table(content: bytes) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table that `table` wrote."""
    import pyarrow as pa
    from pyarrow import parquet

    # In this thread: a process that ends at once would be aborted with pyarrow's threads as they begin, and
    # `parquet.read_table` starts one even with `use_threads=False`.
    with parquet.ParquetFile(pa.BufferReader(content)) as file:
        found = file.read(use_threads=False)
    columns = [column.to_pylist() for column in found.columns]
    return found.column_names, [list(row) for row in zip(*columns, strict=True)]


def _without_secrets(found: Any) -> Any:
    """A table with secrets redacted in its columns of strings."""
    import pyarrow as pa

    for number, column in enumerate(found.columns):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            texts = column.to_pylist()
            kept = [text if text is None else redaction.text(text) for text in texts]
            if kept != texts:
                found = found.set_column(number, found.field(number), pa.array(kept, column.type))
    return found


def _arrow(rows: Any, columns: Sequence[str] | None) -> Any:
    import pyarrow as pa

    if hasattr(rows, "__arrow_c_stream__"):  # pandas, Polars, Arrow and the like
        found = pa.table(rows)
    elif isinstance(rows, Mapping):
        found = pa.table({str(name): _column(name, list(values)) for name, values in rows.items()})
    else:
        found = _from_rows(list(rows), columns)
    return found if columns is None else found.select(list(columns))


def _from_rows(rows: list[Any], columns: Sequence[str] | None) -> Any:
    import pyarrow as pa

    if all(isinstance(row, Mapping) for row in rows) and (rows or columns is None):
        names = list(dict.fromkeys(str(key) for row in rows for key in row))
        return pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})
    if columns is None:
        raise ValueError("rows that are not dicts need column names: columns=[...]")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} cells for {len(columns)} columns")
    cells = list(zip(*rows, strict=True)) or [()] * len(columns)
    named = zip(columns, cells, strict=True)
    return pa.table({str(name): _column(name, list(values)) for name, values in named})


def _column(name: Any, values: list[Any]) -> Any:
    import pyarrow as pa

    plain = [v.item() if hasattr(v, "item") and getattr(v, "ndim", 0) == 0 else v for v in values]
    try:
        return pa.array(plain, from_pandas=False)
    except pa.ArrowException as error:
        raise TypeError(f"column {name!r} of a table: {error}") from error


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # NumPy has no such type
            values = values.float()
    return np.asarray(values)


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    """(height, width) or (height, width, 3 or 4), from 0 to 255."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in _CHANNELS and shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"an image must have one, three or four channels; this array has the shape {shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array.astype(np.uint8) * 255)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an image must be uint8 or floats from 0 to 1; this array is {array.dtype}")
    return np.ascontiguousarray((np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8))
