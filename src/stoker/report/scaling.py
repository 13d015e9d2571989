"""The report of a scaling benchmark: a page that opens offline, its rows as JSON, and the bottlenecks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.errors import BadInput
from stoker.report import assets
from stoker.report.markup import Html, join, number, table, tag
from stoker.run.state import RunView
from stoker.words import counted

_POOR = 0.8
_MUCH = 0.1  # of a step


def cause(row: Mapping[str, Any]) -> str:
    """What limits a row with poor efficiency, in words; empty if the efficiency is good."""
    if row["ranks"] == 1 or row["efficiency"] >= _POOR:
        return ""
    parts = {
        "waiting for data (use more workers)": row["waiting"],
        "communication (larger batches need less of it)": row["communication"],
    }
    worst = max(parts, key=lambda name: parts[name])
    if parts[worst] >= _MUCH:
        return worst
    if row["scaling"] == "strong":
        return "a rank's share of the batch is too small (use a larger batch_size)"
    return "ranks competing for cores or memory bandwidth"


def headings(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The headings of `cells`; short, so that the table fits 80 columns."""
    unit = rows[0]["unit"].removesuffix("ples")
    return ("scaling", "ranks", "batch", f"{unit}/s", "from – to", "eff.", "MiB/rank", "waits", "comm.")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as texts, matching `headings`; the memory is that of the rank that used the most."""
    return [
        row["scaling"], str(row["ranks"]), str(row["batch_size"]), f"{row['rate']:,.0f}",
        f"{min(row['rates']):,.0f} – {max(row['rates']):,.0f}", f"{row['efficiency']:.0%}",
        f"{max(row['peak_bytes']) / 2**20:,.0f}", f"{row['waiting']:.1%}", f"{row['communication']:.1%}",
    ]  # fmt: skip


NAME = "scaling.json"
"""The name of the file with the rows, next to the runs of a recipe."""

_ROW = {
    "scaling", "ranks", "batch_size", "unit", "rate", "rates", "efficiency", "peak_bytes", "waiting",
    "communication", "parallel", "precision", "cause",
}  # fmt: skip
_RESULT = {"recipe", "machine", "torch", "stoker", "cores_per_rank", "steps", "repeats", "rows"}


def load(file: Path) -> dict[str, Any]:
    """Load the JSON that `write` wrote, given itself or its page. Raises BadInput if it is anything else."""
    file = file.with_suffix(".json") if file.suffix == ".html" else file
    try:
        found = orjson.loads(file.read_bytes())
        whole = found.keys() >= _RESULT and all(row.keys() >= _ROW for row in found["rows"])
    except OSError as error:
        raise BadInput(
            f"{file} cannot be read: {error.strerror}; give a file that `stoker bench scaling` wrote"
        ) from error
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        whole = False
    if not whole or not found["rows"]:
        raise BadInput(f"{file} is not a result of `stoker bench scaling`: measure again, or remove the file")
    return dict(found)


def measured(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """The scaling results of the runs' recipes that are stored next to the runs.

    They are in the folder of the runs' experiment, or of the experiment named after the recipe.
    Raises BadInput if such a file cannot be read.
    """
    recipes = {view.recipe_name for view in views}
    folders = [folder for view in views for folder in _folders(view)]
    files = [folder / NAME for folder in dict.fromkeys(folders) if (folder / NAME).is_file()]
    return [found for found in map(load, files) if found["recipe"] in recipes]


def _folders(view: RunView) -> list[Path]:
    experiment = view.directory.path.absolute().parent
    return [experiment, experiment.parent / (view.recipe_name or experiment.name)]


def check(output: Path) -> None:
    """Check beforehand that a report can be written there. Raises BadInput if not."""
    if output.suffix == ".json":
        raise BadInput(f"-o {output}: the rows are written there; name the page, such as {output.stem}.html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error


def write(result: Mapping[str, Any], output: Path) -> Path:
    """Write the page, and all measurements as JSON next to it; returns the JSON file. Raises BadInput."""
    file = output.with_suffix(".json")
    try:
        storage.write_atomically(output, render(result).encode())
        storage.write_atomically(file, orjson.dumps(result, option=orjson.OPT_INDENT_2, default=str))
    except OSError as error:
        raise _unwritable(output, error) from error
    return file


def _unwritable(output: Path, error: OSError) -> BadInput:
    return BadInput(f"{output} cannot be written: {error.strerror}; choose another file with -o")


def render(result: Mapping[str, Any]) -> str:
    """The page as text."""
    name = result["recipe"]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", f"{name} · scaling"),
        tag("style", Html(assets.STYLE)),
    )
    body = tag("body", tag("h1", f"How {name} scales"), section(result))
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def section(result: Mapping[str, Any]) -> Html:
    """The rows, with a bar for each efficiency, and the machine and software they were measured on."""
    rows = result["rows"]
    machine = result["machine"]
    device = ", ".join(machine["gpus"]) or machine["processor"]
    ways = ", ".join(f"{r['parallel']} on {r['ranks']}" for r in rows if r["scaling"] == "strong")
    facts = {
        "machine": f"{device}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{result['cores_per_rank']} cores per rank",
        "software": f"torch {result['torch']}, stoker {result['stoker']}, {machine['system']}",
        "parallelism": ways,
        "precision": ", ".join(dict.fromkeys(str(row["precision"]) for row in rows)),
        "measured": f"{counted(result['repeats'], 'time')} {counted(result['steps'], 'step')}",
    }
    return join([
        tag(
            "p",
            "Strong scaling keeps the global batch constant, weak scaling the batch per rank. Efficiency is "
            "the rate per rank relative to that of the fewest ranks. Communication includes the part that "
            "overlaps with computation.",
        ),
        table((*headings(rows), "", "what limits it"), (_row(row) for row in rows)),
        table((), ([tag("td", key, class_="name"), value] for key, value in facts.items())),
    ])  # fmt: skip


def _row(row: Mapping[str, Any]) -> list[str]:
    figures = cells(row)
    part = tag("i", class_="swatch-0", style=f"width: {min(1.0, row['efficiency']):.2%}")
    bar = tag("td", tag("div", part, class_="bar", style="width: 8em"))
    return [
        figures[0], *(number(figure) for figure in figures[1:]), bar, tag("td", row["cause"], class_="wide"),
    ]  # fmt: skip
