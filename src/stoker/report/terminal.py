"""Runs on a terminal: the list of runs, and the details of one run.

Ids are never wrapped or truncated: a list that is too wide for the terminal drops its least
important columns. Control characters in a run's texts are replaced, because a terminal would
interpret them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stoker import words
from stoker.progress import clock, short
from stoker.report import commands, facts, performance
from stoker.run import finding, query
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView
from stoker.status import FAILED, FINISHED, RUNNING, STOPPED

COLUMNS = ("run", "status", "step", "loss", "val_loss", "started", "time")
_STYLES = {FINISHED: "green", RUNNING: "blue", FAILED: "red", "damaged": "red"}
_DROPPED_FIRST = ("time", "started", "val_loss", "loss", "step", "status")
_GAP = 2
_UNLIMITED = 10_000
_LONGEST = 120  # characters of a value
_END = 30  # of them, from its end
_MOST_DAMAGE = 10
_METRICS = ("", "last", "at step", "best", "at step", "lowest", "highest")


@dataclass(frozen=True)
class Listed:
    """A run in the list: its view, or the reason it cannot be read."""

    directory: RunDirectory
    view: RunView | None
    error: str = ""

    @property
    def status(self) -> str:
        return self.view.status if self.view else "damaged"


@dataclass(frozen=True)
class Pending:
    """What has not been delivered to a sink yet."""

    sink: str
    where: str
    events: int
    error: str | None


def table(headings: Iterable[str], *, right: Container[str] = (), dim: bool = False) -> Table:
    """A table without lines, whose cells are on one line.

    Args:
        right: the headings of columns of numbers, which are aligned to the right.
        dim: whether the headings are.
    """
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim" if dim else "bold")
    for heading in headings:
        made.add_column(heading, no_wrap=True, justify="right" if heading in right else "left")
    return made


def print_whole(console: Console, table: Table) -> None:
    """Print a table without truncating anything; a terminal that is too narrow wraps it."""
    widest = table.__rich_measure__(console, console.options.update(max_width=_UNLIMITED)).maximum
    console.width = max(console.width, widest)
    print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """Print a table; if the output is not a terminal, without spaces at the ends of lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def print_list(console: Console, runs: Sequence[Listed], now: datetime, asked: Sequence[str] = ()) -> None:
    """Print one line per run, as wide as the terminal allows, or in full if the output is not a terminal.

    Names that were `asked` for in a query get their own columns, and so do the metrics that judge the runs.
    """
    more = [name for name in asked if name not in (*COLUMNS, "id", "experiment", "seconds")]
    judged = [name for name in _judged_by(runs) if name not in (*COLUMNS, *more)]
    all_columns = (*COLUMNS[:-2], *more, *judged, *COLUMNS[-2:])
    lines = [_line(run, now, [*more, *judged]) for run in runs]
    columns = fitting(lines, console.width if console.is_terminal else None, all_columns, judged)
    made = table(columns, right=set(columns) - {"run", "status", "started"})
    for line, run in zip(lines, runs, strict=True):
        cells = dict(zip(all_columns, line, strict=True))
        style = _STYLES.get(run.status, "yellow")
        made.add_row(*(Text(cells[c], style=style if c == "status" else "") for c in columns))
    console.width = max(
        console.width, _width(lines, columns, all_columns)
    )  # a long id is the terminal's to wrap
    print_table(console, made)
    for run in runs:
        if run.error:
            console.print(Text(f"damaged: {plain(run.error)}", "red"), soft_wrap=True)


def _judged_by(runs: Sequence[Listed]) -> list[str]:
    """Accuracy, if any run measures it, and the metrics that scripts have set a goal for."""
    views = [run.view for run in runs if run.view is not None]
    accuracy = ["val_accuracy"] if any("val_accuracy" in view.points for view in views) else []
    return list(dict.fromkeys([*accuracy, *(name for view in views for name in view.goals)]))


def fitting(
    lines: Iterable[Sequence[str]],
    width: int | None,
    columns: Sequence[str] = COLUMNS,
    droppable: Sequence[str] = (),
) -> list[str]:
    """The columns that fit into `width` characters; the run's name and what was asked for are always kept."""
    rows, left = list(lines), list(columns)
    for column in (*reversed(droppable), *_DROPPED_FIRST):
        if width is None or _width(rows, left, columns) <= width:
            break
        left.remove(column)
    return left


def print_run(console: Console, view: RunView, sinks: Sequence[Pending]) -> None:
    """Print the details of a run."""
    if not console.is_terminal:
        console.width = _UNLIMITED
    name = view.directory.name
    console.print(Text.assemble((name, "bold"), "  ", (view.status, _STYLES.get(view.status, "yellow"))))
    _print_pairs(console, _summary(view))
    _print_attempts(console, view)
    print_section(console, "metrics", _METRICS, _metrics(view))
    print_section(console, "config", ("", "value", "source"), _config(view))
    print_section(console, "artifacts", ("", "kind", "size", "where"), _artifacts(view))
    uses = [(use.name, _run_name(use.run)) for use in view.used.values()]
    print_section(console, "uses", ("", "made by"), uses)
    users = [(use["name"], _run_name(use["run"])) for use in view.used_by]
    print_section(console, "used by", ("", "run"), users)
    print_section(console, "logged", ("", "kind", "times"), _media(view))
    print_section(console, "sinks", ("", "pending", "where", "error"), [
        (sink.sink, f"{sink.events:,} events" if sink.events else "nothing", sink.where, sink.error or "")
        for sink in sinks
    ])  # fmt: skip
    _print_said(console, view)
    print_heading(console, "next")
    for command in next_commands(view):
        console.print(Text(f"  {command}"), soft_wrap=True)


def next_commands(view: RunView) -> list[str]:
    """The commands to type next, given the status of the run."""
    trial = view.directory.is_trial
    at = finding.option(view.directory.runs)
    run = view.directory.name if trial else view.directory.id  # each sweep has a trial-0000
    if view.status == RUNNING:
        return [f"stoker runs show {run}{at}", f"stoker report {run}{at}"]
    over = view.status in (FINISHED, STOPPED)
    first = [f"stoker runs export {run}{at}"] if over else []
    if not over or (trial and view.status == STOPPED):  # what a search ended early may go on
        first.append(f"stoker resume {run}{at}")
    return [*first, f"stoker report {run}{at}", f"stoker ui{at}"]


def plain(text: str) -> str:
    """A text without control characters, except line ends."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(value: Any) -> str:
    """A value of a config as text; of a long one its beginning and its end, since `--json` has all of it."""
    text = facts.text(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _END - 3]} … {text[-_END:]}"


def when(seconds: float, now: datetime) -> str:
    """A local time, as short as possible while unambiguous today: `05:12`, `Nov 21 05:12`, `2025-11-23`."""
    then = datetime.fromtimestamp(seconds).astimezone()
    if then.date() == now.date():
        return then.strftime("%H:%M")
    return then.strftime("%b %d %H:%M" if then.year == now.year else "%Y-%m-%d")


def _line(run: Listed, now: datetime, more: Sequence[str] = ()) -> tuple[str, ...]:
    name = run.directory.name
    view = run.view
    if view is None:
        return name, run.status, "", "", "", *("" for _ in more), "", ""
    loss, val_loss = facts.number(view.last("loss")), facts.number(view.last("val_loss"))
    known = query.facts(view) if more else {}
    asked = [_cell(known.get(name)) for name in more]
    started, spent = when(view.started, now), clock(view.seconds)
    return name, run.status, _steps(view), loss, val_loss, *asked, started, spent


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return facts.number(value) if isinstance(value, float) else plain(shortened(value))


def _width(rows: Sequence[Sequence[str]], columns: Sequence[str], all_columns: Sequence[str]) -> int:
    widths = [max(len(c), *(len(row[all_columns.index(c)]) for row in rows)) for c in columns]
    return sum(widths) + _GAP * (len(columns) - 1)


def _steps(view: RunView) -> str:
    return str(view.step) if view.total_steps is None else f"{view.step}/{view.total_steps}"


def _summary(view: RunView) -> list[tuple[str, str]]:
    started = datetime.fromtimestamp(view.started).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    kept = facts.kept_checkpoints(view)
    return [
        ("step", _steps(view)),
        ("left out", facts.left_out(view)),
        ("started", f"{started}, {clock(view.seconds)} spent"),
        ("where", words.shortest(view.directory.path)),
        ("recipe", view.recipe_name or ""),
        *zip(("command", *[""] * len(view.attempts)), commands.of(view), strict=False),
        ("layout", facts.layout(view)),
        ("throughput", _throughput(view)),
        ("memory", _memory(view)),
        ("time", _time(view)),
        ("code", facts.code(view)),
        ("checkpoints", f"at step {', '.join(map(str, kept))}" if kept else "none"),
    ]


def _throughput(view: RunView) -> str:
    found = performance.throughput(view)
    if found is None:
        return ""
    several = f", {short(found.per_gpu)} per rank" if found.per_gpu < found.median else ""
    used = performance.utilisation(found)
    return f"{short(found.median)} {found.unit}/s{several}{f', MFU {used}' if used else ''}"


def _memory(view: RunView) -> str:
    found = performance.memory(view)
    if found is None:
        return ""
    most = found.fullest
    kinds = ", ".join(f"{kind} {performance.gib(held)}" for kind, held in most.kinds.items())
    return f"peak {performance.of_capacity(most, found.capacity)} on rank {most.rank}: {kinds}"


def _time(view: RunView) -> str:
    """Where the time went, largest share first; shares below 1% are left out."""
    spent = performance.time_spent(view)
    total = sum(spent.values())
    shares = sorted(((seconds / total, kind) for kind, seconds in spent.items() if total), reverse=True)
    return ", ".join(f"{share:.0%} {kind}" for share, kind in shares if share >= 0.01)


def _print_attempts(console: Console, view: RunView) -> None:
    rows = []
    for attempt in view.attempts:
        started = datetime.fromtimestamp(attempt.started).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        spent = clock(attempt.seconds)
        status = view.status if attempt is view.attempts[-1] else attempt.status
        begun = "" if attempt.resumed_from is None else str(attempt.resumed_from)
        rows.append((str(attempt.number), started, spent, begun, facts.where(attempt), status))
    print_section(console, "attempts", ("", "started", "time", "from step", "host", "ended"), rows)
    for attempt in view.attempts:
        for note in facts.attempt_notes(view, attempt):
            console.print(Text(f"  {attempt.number}: {plain(note)}"))


def _print_said(console: Console, view: RunView) -> None:
    """Params, tags and notes, and the damaged lines of the journal."""
    print_section(console, "params", ("", "value"), [(k, shortened(v)) for k, v in view.params.items()])
    print_section(console, "tags", ("", "value"), [(k, shortened(v)) for k, v in view.tags.items()])
    if view.notes:
        print_heading(console, "notes")
        for _, text in view.notes:
            console.print(Text(f"  {plain(text)}"))
    if view.damage:
        print_heading(console, "damaged journal lines; everything else was read")
        for damage in view.damage[:_MOST_DAMAGE]:
            console.print(Text(f"  {plain(str(damage))}", "red"), soft_wrap=True)
        if len(view.damage) > _MOST_DAMAGE:
            console.print(Text(f"  and {len(view.damage) - _MOST_DAMAGE:,} more lines", "red"))


def _run_name(run: Mapping[str, str] | None) -> str:
    return f"{run['experiment']}/{run['id']}" if run else "no run"


def _media(view: RunView) -> list[tuple[str, ...]]:
    """Logged media by name; the many histograms of a watch are shown as one."""
    found: dict[tuple[str, str], int] = {}
    for media in view.media:
        name = media.name
        if media.kind == "histogram" and name.startswith(("gradients/", "parameters/")):
            name = f"{name.split('/')[0]}/..."
        found[name, media.kind] = found.get((name, media.kind), 0) + 1
    return [(name, kind, f"{count:,}") for (name, kind), count in sorted(found.items())]


def _metrics(view: RunView) -> list[tuple[str, ...]]:
    return [
        (
            name, facts.number(m.last), str(m.last_step), facts.number(m.best),
            "" if m.best_step is None else str(m.best_step), facts.number(m.min), facts.number(m.max),
        )
        for name, m in facts.metrics(view).items()
    ]  # fmt: skip


def _config(view: RunView) -> list[tuple[str, ...]]:
    return [(v.key, shortened(v.value), v.source) for v in facts.config(view)]


def _artifacts(view: RunView) -> list[tuple[str, ...]]:
    return [(a.name, a.kind, words.size(a.bytes), a.path) for a in facts.artifacts(view)]


def _print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    for key, value in pairs:
        if value:
            console.print(Text.assemble((f"  {key:12}", "dim"), plain(value)), soft_wrap=True)


def print_section(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table under a heading; nothing if it has no rows."""
    if not rows:
        return
    print_heading(console, title)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    table.add_column("")
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row("", *(Text(plain(cell)) for cell in row))
    print_table(console, table)


def print_heading(console: Console, title: str) -> None:
    """The heading of a section."""
    console.print()
    console.print(Text(title, "bold"))
