"""Runs side by side: config that differs, the summary of every metric, and small curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from stoker.progress import clock
from stoker.report import facts
from stoker.report.html import run_names
from stoker.report.terminal import plain, print_table, shortened
from stoker.run.series import Series, Summary
from stoker.run.state import RunView

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # characters of a small curve
_NOTHING = "–"


@dataclass(frozen=True)
class Comparison:
    """Several runs, their names, and how they compare."""

    names: list[str]
    views: list[RunView]
    config: dict[str, list[Any]]
    """Config keys and params whose values differ -> the value of each run, None if it has no value."""
    same: int
    """How many keys have the same value in all runs."""
    metrics: dict[str, list[Summary | None]]


def compare(views: Sequence[RunView]) -> Comparison:
    """Compare runs in the given order."""
    configs = [{**view.config, **view.params} for view in views]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    differ = {key: found for key, found in values.items() if len({facts.text(v) for v in found}) > 1}
    found = [facts.metrics(view) for view in views]
    names = dict.fromkeys(name for metrics in found for name in metrics)
    ranked = sorted(
        names, key=lambda n: (-sum(n in metrics for metrics in found), n != "loss", n != "val_loss")
    )
    return Comparison(
        names=run_names(views), views=list(views), config=differ, same=len(keys) - len(differ),
        metrics={name: [metrics.get(name) for metrics in found] for name in ranked},
    )  # fmt: skip


def as_json(compared: Comparison) -> dict[str, Any]:
    """The comparison as JSON: `config` and `metrics` by key, one value per run, in the order of `runs`."""
    return {
        "runs": [
            {"id": v.directory.id, "experiment": v.directory.experiment, "path": str(v.directory.path),
             "status": v.status, "step": v.step, "seconds": v.seconds}
            for v in compared.views
        ],
        "config": compared.config,
        "metrics": {
            name: [summary.facts() if summary else None for summary in found]
            for name, found in compared.metrics.items()
        },
    }  # fmt: skip


def print_comparison(console: Console, compared: Comparison) -> None:
    """Print one column per run: config first, then the last value, best value and curve of each metric."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in compared.names:
        table.add_column(plain(name), overflow="fold")
    table.add_row("status", *(view.status for view in compared.views))
    table.add_row("step", *(f"{view.step:,}" for view in compared.views))
    table.add_row("time", *(clock(view.seconds) for view in compared.views))
    _heading(table, f"config that differs ({compared.same} keys are the same)")
    for key, values in compared.config.items():
        table.add_row(plain(key), *(_NOTHING if v is None else plain(shortened(v)) for v in values))
    _heading(table, "metrics")
    for name, found in compared.metrics.items():
        _add_metric(table, compared, name, found)
    if not console.is_terminal:
        console.width = 10_000
    print_table(console, table)


def sparkline(series: Series, low: float, high: float) -> str:
    """A curve as bars from `low` to `high`: the mean of each stretch, a gap if no value in it is finite."""
    bars = []
    for part in np.array_split(series.y, min(_WIDTH, len(series))):
        finite = part[np.isfinite(part)]
        if len(finite) == 0:
            bars.append(" ")
            continue
        unit = max(abs(low), abs(high))  # differences and sums of large values are infinite
        within = high / unit - low / unit if high > low else 0.0
        share = (float((finite / unit).mean()) - low / unit) / within if within else 0.5
        bars.append(_BARS[min(len(_BARS) - 1, max(0, round(share * (len(_BARS) - 1))))])
    return "".join(bars)


def _add_metric(table: Table, compared: Comparison, name: str, found: Sequence[Summary | None]) -> None:
    """The last and best value of each run, the best run in bold; below it the curves on one scale."""
    best = _best_run(found)
    cells = []
    for index, summary in enumerate(found):
        cells.append(Text(_last_and_best(summary), style="bold green" if index == best else ""))
    table.add_row(plain(name), *cells)
    lows = [s.min for s in found if s is not None and s.min is not None]
    highs = [s.max for s in found if s is not None and s.max is not None]
    curves = [view.points.get(name) for view in compared.views]
    if lows and any(curve is not None and len(curve) > 2 for curve in curves):
        drawn = ["" if c is None else sparkline(c, min(lows), max(highs)) for c in curves]
        table.add_row("", *(Text(line, style="dim") for line in drawn))


def _last_and_best(summary: Summary | None) -> str:
    if summary is None:
        return _NOTHING
    last = facts.number(summary.last)
    if summary.best is None or summary.best_step == summary.last_step:
        return last
    return f"{last}  (best {facts.number(summary.best)} at {summary.best_step:,})"


def _best_run(found: Sequence[Summary | None]) -> int | None:
    """Which run has the best value; None if that is unknown, or all are equal."""
    known = {i: s.best for i, s in enumerate(found) if s is not None and s.best is not None}
    if len(known) < 2 or len(set(known.values())) == 1 or not all(map(math.isfinite, known.values())):
        return None
    goal = next(s.goal for s in found if s is not None and s.goal is not None)
    pick = min if goal == "min" else max
    return pick(known, key=lambda i: known[i])


def _heading(table: Table, title: str) -> None:
    table.add_row("")
    table.add_row(Text(title, style="dim"))
