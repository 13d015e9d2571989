"""`stoker runs list`: list all runs, or those that match a query."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import entry, listed, started
from stoker.errors import BadInput, nearest
from stoker.report import terminal
from stoker.report.terminal import Listed
from stoker.run import finding
from stoker.run.directory import RunDirectory
from stoker.run.query import Query, facts
from stoker.words import counted, some

_ALWAYS_KNOWN = ("id", "experiment", "status", "step", "started", "seconds")


def list_(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR|EXPERIMENT]",
            parser=finding.folder,
            show_default=False,
            help="A runs folder, as --runs; or an experiment or a sweep, for all its runs.",
        ),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option("--filter", metavar="QUERY", help="e.g. 'val_loss < 0.3 and lr > 1e-4'"),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort", metavar="NAME", help="A metric, config key or tag; -NAME for the largest first."
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """List runs, the newest last.

    A query compares metrics (their newest value), config keys, tags, and id, experiment,
    status, step, started and seconds, with < <= > >= == != in, and, or, not. Also
    best(val_loss), min(...), max(...). Put names with other characters in `backticks`.
    """
    runs, meant = _meant(runs, folder)
    found = sorted(map(listed, meant), key=started)
    shown, names = chosen(found, filter, sort)
    if json:
        print_json({"runs": [entry(run) for run in shown]})
    elif shown:
        terminal.print_list(console(), shown, datetime.now().astimezone(), names)
    elif found:
        console().print(
            f"none of {counted(len(found), 'run')} under {finding.shown(runs)} matches", markup=False
        )
    else:
        first = "stoker train llm model=tiny data=python-docs max_steps=60"
        console().print(f"no runs under {finding.shown(runs)} yet; start one: {first}", markup=False)


def _meant(runs: Path, folder: Path | None) -> tuple[Path, list[RunDirectory]]:
    """The folder to list, and its runs: those of a runs folder, or of an experiment.

    Raises BadInput if it is neither a folder nor an experiment, while there are experiments to choose from.
    """
    within = finding.every(folder or runs)
    if within or folder is None:
        return folder or runs, within
    known = finding.every(runs)
    members = finding.members(runs, str(folder), known)
    if members:
        return members[0].path.parent, members
    names = sorted({run.experiment for run in known})
    if names and not folder.is_dir():
        raise BadInput(
            f"{folder} is neither an experiment nor a folder of runs{nearest(str(folder), names)}; the "
            f"experiments in {finding.shown(runs)} are {some(names)}"
        )
    return folder, within


def chosen(runs: Sequence[Listed], filter: str | None, sort: str | None) -> tuple[list[Listed], list[str]]:
    """The runs that match the filter, sorted, and the names that filter and sort use.

    Raises BadInput if either cannot be parsed or uses a name that no run has. A damaged run has
    no facts: it is listed only without a filter and a sort.
    """
    if filter is None and sort is None:
        return list(runs), []
    known = {run.directory.path: facts(run.view) for run in runs if run.view is not None}
    names = list(_ALWAYS_KNOWN) + [name for found in known.values() for name in found]
    left = [run for run in runs if run.directory.path in known]
    asked: list[str] = []
    if filter is not None:
        query = Query(filter)
        query.check_names(names)
        left = [run for run in left if query.matches(known[run.directory.path])]
        asked += query.names
    if sort is not None:
        key = Query(sort.removeprefix("-"))
        if len(key.names) != 1 or sort.removeprefix("-").strip() not in (key.names[0], f"`{key.names[0]}`"):
            raise BadInput(f"--sort {sort!r}: give one name, such as val_loss, best(val_loss) or -step")
        key.check_names(names)
        left = _in_order(
            left, {run.directory.path: key.value(known[run.directory.path]) for run in left}, sort
        )
        asked += key.names
    return left, list(dict.fromkeys(asked))


def _in_order(runs: Sequence[Listed], values: Mapping[Any, Any], sort: str) -> list[Listed]:
    """Sort by value, numbers before texts; missing values and NaN come last in either direction."""
    have = [run for run in runs if not _is_nothing(values[run.directory.path])]
    lack = [run for run in runs if _is_nothing(values[run.directory.path])]

    def key(run: Listed) -> tuple[bool, Any]:
        value = values[run.directory.path]
        return (False, value) if isinstance(value, int | float) else (True, str(value))

    return [*sorted(have, key=key, reverse=sort.startswith("-")), *lack]


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
