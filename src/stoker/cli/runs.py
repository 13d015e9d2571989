"""`stoker runs list|show|export`: what runs there are, what one was, and its metrics as a table."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer
from stoker import storage
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.errors import BadInput, StokerError
from stoker.report import facts, terminal
from stoker.report.terminal import Listed, Pending
from stoker.run import directory, view
from stoker.run.directory import RunDirectory
from stoker.run.view import RunView

app = typer.Typer(help="What runs there are, what they were, and their metrics.", no_args_is_help=True)

Format = Literal["csv", "parquet", "json"]
Row = dict[str, float | int | None]
RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, the start of one, experiment/id, or its path."),
]


@app.command("list")
def list_(runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """List the runs, the newest last."""
    found = sorted((_listed(run) for run in directory.every(runs)), key=_started)
    if json:
        print_json({"runs": [_entry(run) for run in found]})
    elif found:
        terminal.print_list(console(), found, datetime.now().astimezone())
    else:
        first = "stoker train llm model=tiny data=python-docs max_steps=60"
        console().print(f"no runs under {runs} yet; start one: {first}", markup=False)


@app.command()
def show(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Show a run: status, attempts, metrics, config with its sources, artifacts."""
    seen = view.load(directory.find(runs, run))
    sinks = _sinks(seen.directory)
    if json:
        print_json(_everything(seen, sinks))
    else:
        terminal.print_run(console(), seen, sinks)


@app.command()
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
    found = directory.find(runs, run)
    if output is None:
        _check_standard_output(format, json, found)
    rows = view.load(found).rows()
    if output is not None:
        _write(output, encode(rows, format))
        answer = {"run": str(found.path), "format": format, "file": str(output), "rows": len(rows)}
        if json:
            print_json(answer)
        else:
            sys.stderr.write(f"{output}: {len(rows)} rows\n")
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


def _listed(run: RunDirectory) -> Listed:
    try:
        return Listed(run, view.load(run))
    except (StokerError, OSError, LookupError, TypeError, ValueError) as error:
        # Whatever is wrong with one run, the others are still listed.
        reason = str(error) if isinstance(error, StokerError) else f"{run.path}: {error!r}"
        return Listed(run, None, reason)


def _started(run: Listed) -> tuple[float, str]:
    started = run.view.started if run.view else run.directory.path.stat().st_mtime
    return started, run.directory.id


def _entry(run: Listed) -> dict[str, Any]:
    where = {"id": run.directory.id, "experiment": run.directory.experiment,
             "path": str(run.directory.path.absolute()), "status": run.status}  # fmt: skip
    if run.view is None:
        return {**where, "error": run.error, "step": None, "total_steps": None, "metrics": {},
                "started": None, "seconds": None}  # fmt: skip
    return {
        **where,
        "step": run.view.step,
        "total_steps": run.view.total_steps,
        "metrics": run.view.newest(),
        "started": _iso(run.view.started),
        "seconds": run.view.seconds,
    }


def _everything(seen: RunView, sinks: Sequence[Pending]) -> dict[str, Any]:
    return {
        **_entry(Listed(seen.directory, seen)),
        "recipe": seen.record.get("recipe"),
        "command": facts.command(seen),
        "seed": seen.record.get("seed"),
        "attempts": [
            {**vars(a), "status": seen.status if a is seen.attempts[-1] else a.status,
             "started": _iso(a.started), "ended": _iso(a.ended), "last_event": _iso(a.last_event)}
            for a in seen.attempts
        ],
        "config": {v.key: {"value": v.value, "source": v.source} for v in facts.config(seen)},
        "metrics": {name: summary.facts() for name, summary in facts.metrics(seen).items()},
        "checkpoints": facts.kept_checkpoints(seen),
        "artifacts": [vars(a) for a in facts.artifacts(seen)],
        "code": seen.record.get("code"),
        "tags": seen.tags,
        "sinks": [vars(sink) for sink in sinks],
        "next": terminal.next_commands(seen),
    }  # fmt: skip


def _iso(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else None


def _sinks(run: RunDirectory) -> list[Pending]:
    from stoker.tracking import follower

    return [Pending(s.name, s.where, s.pending, s.error) for s in follower.state(run)]
