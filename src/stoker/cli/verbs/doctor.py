"""`stoker doctor`: what this machine has, and what would go wrong in a training run here."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from stoker import signals, words
from stoker.cli.output import DEFAULT_RUNS, Json, console, print_json
from stoker.doctor import checks
from stoker.doctor.findings import Finding

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
_STATE, _AREA = 7, 9  # columns


def doctor(
    runs: Annotated[
        str,
        typer.Option(
            "--runs",
            envvar="STOKER_RUNS",
            metavar="DIR",
            help="The folder to check for storing runs, or s3://bucket/folder; it is not created.",
        ),
    ] = str(DEFAULT_RUNS),
    json: Json = False,
) -> int:
    """Check what this machine has and what would go wrong here. The exit code is 1 if there is a problem.

    This takes about half a minute and leaves nothing behind.
    """
    # A finding reports whatever matters of what libraries log.
    logging.getLogger().addHandler(logging.NullHandler())
    terminal = console()
    found: list[dict[str, str]] = []
    with signals.raised(), _nothing_left():
        for check in checks.of(runs):
            with _waiting(terminal, check.area, shown=not json):
                for finding in checks.made(check):
                    found.append({"area": check.area, **asdict(finding)})
                    if not json:
                        _print(terminal, check.area, finding)
    counts = Counter(row["state"] for row in found)
    if json:
        print_json({"findings": found, "problems": counts["problem"]})
    else:
        terminal.print(_summary(counts), markup=False)
    return int(counts["problem"] > 0)


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """At the end of the block, kill the processes that abandoned checks have left."""
    try:
        yield
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _waiting(terminal: Console, area: str, *, shown: bool) -> contextlib.AbstractContextManager[object]:
    """Show what is being checked, on a terminal."""
    return terminal.status(f"{area} ...") if shown and sys.stdout.isatty() else contextlib.nullcontext()


def _print(terminal: Console, area: str, finding: Finding) -> None:
    """Print a finding on one line; on a terminal, its text is wrapped in a column."""
    if not sys.stdout.isatty():
        line = f"{finding.state:{_STATE}}  {area:{_AREA}}  {finding.text}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        return
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=_STATE)
    row.add_column(width=_AREA)
    row.add_column(overflow="fold")
    row.add_row(Text(finding.state, style=_STYLES[finding.state]), area, Text(finding.text))
    terminal.print(row)


def _summary(counts: Counter[str]) -> str:
    problems = words.counted(counts["problem"], "problem") if counts["problem"] else "no problem"
    return f"{problems}, {words.counted(counts['note'], 'note')}"
