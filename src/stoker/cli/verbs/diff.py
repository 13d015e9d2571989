"""`stoker diff A B`: what differs between two runs."""

from __future__ import annotations

from typing import Annotated

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.errors import BadInput
from stoker.report import run_difference
from stoker.run import finding, view

_HELP = "A run: its id, the start of its id, experiment/id, or its path."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other run.")],
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Show what differs between two runs. Compared are config, code, packages, data, machine and curves."""
    found = [finding.find(runs, name) for name in (a, b)]
    if found[0].path.resolve() == found[1].path.resolve():
        raise BadInput(f"{a} and {b} are the same run: give two different ones")
    compared = run_difference.compare(view.load(found[0]), view.load(found[1]))
    if json:
        print_json(run_difference.as_json(compared))
    else:
        run_difference.print_difference(console(), compared)
