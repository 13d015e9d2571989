"""`stoker runs export RUN...`: export the metrics of runs as a table."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import typer
from stoker import storage
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, print_json
from stoker.cli.verbs.runs.common import RunsMeant
from stoker.errors import BadInput
from stoker.run import reading
from stoker.run.state import RunView
from stoker.words import counted

if TYPE_CHECKING:
    import pyarrow

Format = Literal["csv", "parquet", "json"]


def export(
    run: RunsMeant,
    format: Annotated[Format, typer.Option("--format", help="csv, parquet or json.")] = "csv",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; by default standard output.")
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="Add config keys and params as columns, e.g. config.lr.")
    ] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Export the metrics of runs, one row per step. `step` is first, then the metrics by name.

    With several runs, each row begins with `run`, as experiment/id; a metric that a run lacks is empty.
    """
    views = reading.read(runs, run)
    if output is None:
        _check_standard_output(format, json, views)
    table = reading.table(views, config=config)
    paths = [str(seen.directory.path) for seen in views]
    about: dict[str, Any] = {"run": paths[0]} if len(paths) == 1 else {"runs": paths}
    if output is not None:
        _write(output, encode(table, format))
        if json:
            print_json({**about, "format": format, "file": str(output), "rows": len(table)})
        else:
            sys.stderr.write(f"{output}: {counted(len(table), 'row')}\n")
    elif json:
        print_json({**about, "rows": table.to_pylist()})
    else:
        sys.stdout.buffer.write(encode(table, format))
        sys.stdout.flush()


def encode(table: pyarrow.Table, format: Format) -> bytes:
    """A table as CSV (UTF-8, with a header), Parquet, or JSON (a list of objects).

    Numbers keep their full precision. A value that was not logged is empty in CSV and null
    elsewhere; NaN and infinities are `nan`, `inf`, `-inf` in CSV, kept in Parquet, and null in
    JSON, which cannot represent them.
    """
    encoders = {"csv": _csv, "parquet": _parquet, "json": _json}
    return encoders[format](table)


def _csv(table: pyarrow.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return text.getvalue().encode()


def _parquet(table: pyarrow.Table) -> bytes:
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def _json(table: pyarrow.Table) -> bytes:
    return orjson.dumps(table.to_pylist(), option=orjson.OPT_INDENT_2) + b"\n"


def _check_standard_output(format: Format, json: bool, views: Sequence[RunView]) -> None:
    name = views[0].directory.id if len(views) == 1 else "runs"
    suggestion = f"add -o {name}.{format}"
    if json and format != "json":
        raise BadInput(f"with --json, {format} needs a file: {suggestion}")
    if format == "parquet" and sys.stdout.isatty():
        raise BadInput(f"parquet is binary and cannot be printed to a terminal: {suggestion}")


def _write(file: Path, content: bytes) -> None:
    try:
        storage.write_atomically(file, content)
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from error
