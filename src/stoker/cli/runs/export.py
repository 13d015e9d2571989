"""`stoker runs export RUN`: a run's metrics as a table."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import orjson
import typer
from stoker import storage
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, print_json
from stoker.cli.runs.common import RunName
from stoker.errors import BadInput
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.words import counted

Format = Literal["csv", "parquet", "json"]
Row = dict[str, float | int | None]


def export(
    run: RunName,
    format: Annotated[Format, typer.Option("--format", help="csv, parquet or json.")] = "csv",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; by default standard output.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Export the metrics of a run: a row a step, `step` first, then the metrics by name."""
    found = finding.find(runs, run)
    if output is None:
        _check_standard_output(format, json, found)
    rows = view.load(found).rows()
    if output is not None:
        _write(output, encode(rows, format))
        answer = {"run": str(found.path), "format": format, "file": str(output), "rows": len(rows)}
        if json:
            print_json(answer)
        else:
            sys.stderr.write(f"{output}: {counted(len(rows), 'row')}\n")
    elif json:
        print_json({"run": str(found.path), "rows": rows})
    else:
        sys.stdout.buffer.write(encode(rows, format))
        sys.stdout.flush()


def encode(rows: Sequence[Row], format: Format) -> bytes:
    """Rows as CSV (UTF-8, with a header), Parquet, or JSON (a list of objects).

    Numbers keep their full precision. A value that was not logged is empty in CSV and null
    elsewhere; NaN and infinities are `nan`, `inf`, `-inf` in CSV, themselves in Parquet, and
    null in JSON, which knows none.
    """
    encoders = {"csv": _csv, "parquet": _parquet, "json": _json}
    return encoders[format](rows)


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    columns = list(rows[0]) if rows else ["step"]
    types = {column: pa.int64() if column == "step" else pa.float64() for column in columns}
    arrays = {c: pa.array([row[c] for row in rows], type=types[c], from_pandas=False) for c in columns}
    sink = io.BytesIO()
    parquet.write_table(pa.table(arrays), sink)
    return sink.getvalue()


def _json(rows: Sequence[Row]) -> bytes:
    return orjson.dumps(rows, option=orjson.OPT_INDENT_2) + b"\n"


def _check_standard_output(format: Format, json: bool, run: RunDirectory) -> None:
    suggestion = f"add -o {run.id}.{format}"
    if json and format != "json":
        raise BadInput(f"with --json, {format} needs a file: {suggestion}")
    if format == "parquet" and sys.stdout.isatty():
        raise BadInput(f"parquet is not for a terminal: {suggestion}")


def _write(file: Path, content: bytes) -> None:
    try:
        storage.write_atomically(file, content)
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from error
