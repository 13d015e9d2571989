"""Runs on a terminal: the list, and what is worth knowing about one.

Ids are never wrapped or cut: a list that is too wide for the terminal loses its least
important columns. Texts of a run are shown without their control characters, which a
terminal would obey.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stoker.progress import clock
from stoker.report import facts
from stoker.run.directory import RunDirectory
from stoker.run.view import RunView

COLUMNS = ("run", "status", "step", "loss", "val_loss", "started", "time")
_STYLES = {"finished": "green", "running": "blue", "failed": "red", "damaged": "red"}
_DROPPED_FIRST = ("time", "started", "val_loss", "loss", "step", "status")
_GAP = 2
_UNLIMITED = 10_000
_METRICS = ("", "last", "at step", "best", "at step", "lowest", "highest")


@dataclass(frozen=True)
class Listed:
    """A run of the list: its view, or why there is none."""

    directory: RunDirectory
    view: RunView | None
    error: str = ""

    @property
    def status(self) -> str:
        return self.view.status if self.view else "damaged"


@dataclass(frozen=True)
class Pending:
    """What a sink has not got yet."""

    sink: str
    where: str
    events: int
    error: str | None


def print_list(console: Console, runs: Sequence[Listed], now: datetime) -> None:
    """Print a line a run, as wide as the terminal allows; all of it where there is none."""
    lines = [_line(run, now) for run in runs]
    columns = fitting(lines, console.width if console.is_terminal else None)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for column in columns:
        right = column in ("step", "loss", "val_loss", "time")
        table.add_column(column, no_wrap=True, justify="right" if right else "left")
    for line, run in zip(lines, runs, strict=True):
        cells = dict(zip(COLUMNS, line, strict=True))
        style = _STYLES.get(run.status, "yellow")
        table.add_row(*(Text(cells[c], style=style if c == "status" else "") for c in columns))
    console.width = max(console.width, _width(lines, columns))  # a long id is the terminal's to wrap
    console.print(table)
    for run in runs:
        if run.error:
            console.print(Text(f"damaged: {plain(run.error)}", "red"), soft_wrap=True)


def fitting(lines: Iterable[Sequence[str]], width: int | None) -> list[str]:
    """The columns that fit into `width` characters; the run's name always does."""
    rows, columns = list(lines), list(COLUMNS)
    for column in _DROPPED_FIRST:
        if width is None or _width(rows, columns) <= width:
            break
        columns.remove(column)
    return columns


def print_run(console: Console, view: RunView, sinks: Sequence[Pending]) -> None:
    """Print everything a person asks about a run."""
    if not console.is_terminal:
        console.width = _UNLIMITED
    name = f"{view.directory.experiment}/{view.directory.id}"
    console.print(Text.assemble((name, "bold"), "  ", (view.status, _STYLES.get(view.status, "yellow"))))
    _print_pairs(console, _summary(view))
    _print_attempts(console, view)
    _print_section(console, "metrics", _METRICS, _metrics(view))
    _print_section(console, "config", ("", "value", "source"), _config(view))
    _print_section(console, "artifacts", ("", "kind", "size", "where"), _artifacts(view))
    _print_section(console, "sinks", ("", "pending", "where", "error"), [
        (sink.sink, f"{sink.events:,} events" if sink.events else "nothing", sink.where, sink.error or "")
        for sink in sinks
    ])  # fmt: skip
    _heading(console, "next")
    for command in next_commands(view):
        console.print(Text(f"  {command}"), soft_wrap=True)


def next_commands(view: RunView) -> list[str]:
    """What to type next, by how the run stands."""
    run = view.directory.id
    if view.status == "running":
        return [f"stoker runs show {run}", f"stoker report {run}"]
    first = [f"stoker runs export {run}"] if view.status == "finished" else [f"stoker resume {run}"]
    return [*first, f"stoker report {run}", "stoker ui"]


def plain(text: str) -> str:
    """A text without control characters, its line ends apart."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def when(seconds: float, now: datetime) -> str:
    """A local time, as short as it is clear today: `05:12`, `Nov 21 05:12`, `2025-11-23`."""
    then = datetime.fromtimestamp(seconds).astimezone()
    if then.date() == now.date():
        return then.strftime("%H:%M")
    return then.strftime("%b %d %H:%M" if then.year == now.year else "%Y-%m-%d")


def _line(run: Listed, now: datetime) -> tuple[str, ...]:
    name = f"{run.directory.experiment}/{run.directory.id}"
    view = run.view
    if view is None:
        return name, run.status, "", "", "", "", ""
    loss, val_loss = facts.number(view.last("loss")), facts.number(view.last("val_loss"))
    return name, run.status, _steps(view), loss, val_loss, when(view.started, now), clock(view.seconds)


def _width(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> int:
    widths = [max(len(c), *(len(row[COLUMNS.index(c)]) for row in rows)) for c in columns]
    return sum(widths) + _GAP * (len(columns) - 1)


def _steps(view: RunView) -> str:
    return str(view.step) if view.total_steps is None else f"{view.step}/{view.total_steps}"


def _summary(view: RunView) -> list[tuple[str, str]]:
    started = datetime.fromtimestamp(view.started).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    kept = facts.kept_checkpoints(view)
    return [
        ("step", _steps(view)),
        ("started", f"{started}, {clock(view.seconds)} spent"),
        ("where", _shortest(view.directory.path)),
        ("recipe", str((view.record.get("recipe") or {}).get("name", ""))),
        ("command", facts.command(view)),
        ("code", facts.code(view)),
        ("checkpoints", f"at step {', '.join(map(str, kept))}" if kept else "none"),
    ]


def _print_attempts(console: Console, view: RunView) -> None:
    rows = []
    for attempt in view.attempts:
        started = datetime.fromtimestamp(attempt.started).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        spent = clock((attempt.ended or attempt.last_event or attempt.started) - attempt.started)
        status = view.status if attempt is view.attempts[-1] else attempt.status
        begun = "" if attempt.resumed_from is None else str(attempt.resumed_from)
        rows.append((str(attempt.number), started, spent, begun, attempt.host, status))
    _print_section(console, "attempts", ("", "started", "time", "from step", "host", "ended"), rows)
    for attempt in view.attempts:
        for note in facts.attempt_notes(view, attempt):
            console.print(Text(f"  {attempt.number}: {plain(note)}"))


def _metrics(view: RunView) -> list[tuple[str, ...]]:
    return [
        (
            name, facts.number(m.last), str(m.last_step), facts.number(m.best),
            "" if m.best_step is None else str(m.best_step), facts.number(m.min), facts.number(m.max),
        )
        for name, m in facts.metrics(view).items()
    ]  # fmt: skip


def _config(view: RunView) -> list[tuple[str, ...]]:
    return [(v.key, facts.text(v.value), v.source) for v in facts.config(view)]


def _artifacts(view: RunView) -> list[tuple[str, ...]]:
    return [(a.name, a.kind, facts.size(a.bytes), a.path) for a in facts.artifacts(view)]


def _print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    for key, value in pairs:
        if value:
            console.print(Text.assemble((f"  {key:12}", "dim"), plain(value)), soft_wrap=True)


def _print_section(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    if not rows:
        return
    _heading(console, title)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    table.add_column("")
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row("", *(Text(plain(cell)) for cell in row))
    console.print(table)


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, "bold"))


def _shortest(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
