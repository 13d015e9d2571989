"""The report of a scaling benchmark: a page that opens offline, its rows as JSON, and what limits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.errors import BadInput
from stoker.report import assets
from stoker.report.markup import Html, number, table, tag

HEADINGS = (
    "scaling", "ranks", "batch", "rate", "lowest – highest", "efficiency", "peak/rank", "waiting", "comm.",
)  # fmt: skip

_POOR = 0.8
_MUCH = 0.1  # of a step


def cause(row: Mapping[str, Any]) -> str:
    """What limits a row whose efficiency is poor, in words; empty where it is not."""
    if row["ranks"] == 1 or row["efficiency"] >= _POOR:
        return ""
    parts = {
        "waiting for data (give it more workers)": row["waiting"],
        "communication (larger batches need less of it)": row["communication"],
    }
    worst = max(parts, key=lambda name: parts[name])
    if parts[worst] >= _MUCH:
        return worst
    if row["scaling"] == "strong":
        return "a rank's share of the batch, too small to fill it (give a larger batch_size)"
    return "ranks competing for cores or memory bandwidth"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as texts, under `HEADINGS`."""
    low, high = row["rate_spread"]
    return [
        row["scaling"], str(row["ranks"]), str(row["batch_size"]), f"{row['rate']:,.0f} {row['unit']}/s",
        f"{low:,.0f} – {high:,.0f}", f"{row['efficiency']:.0%}", f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        f"{row['waiting']:.1%}", f"{row['communication']:.1%}",
    ]  # fmt: skip


def write(name: str, rows: Sequence[Mapping[str, Any]], output: Path) -> Path:
    """Write the page, and the rows as JSON beside it; returns the latter. Raises BadInput."""
    file = output.with_suffix(".json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(output, render(name, rows).encode())
        storage.write_atomically(file, orjson.dumps(list(rows), option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise BadInput(
            f"{output} cannot be written: {error.strerror}; choose another file with -o"
        ) from error
    return file


def render(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page as text: the rows, with a bar for each efficiency."""
    body = tag(
        "body",
        tag("h1", f"How {name} scales"),
        tag(
            "p",
            "Strong scaling keeps the global batch, weak scaling a rank's share of it. Efficiency is the "
            "rate over that of the fewest ranks times the ranks. Communication counts what ran beside "
            "computation as well.",
        ),
        table((*HEADINGS, "efficiency", ""), (_row(row) for row in rows)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", f"{name} · scaling"),
        tag("style", Html(assets.STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def _row(row: Mapping[str, Any]) -> list[str]:
    figures = cells(row)
    width = f"{min(1.0, row['efficiency']) * 8:.2f}em"
    bar = tag("div", " ", style=f"width: {width}; background: currentColor; opacity: 0.5")
    return [figures[0], *(number(figure) for figure in figures[1:]), tag("td", bar), row["cause"]]
