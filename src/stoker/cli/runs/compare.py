"""`stoker runs compare A B C`: what differs between runs, and what they came to."""

from __future__ import annotations

from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.runs.common import RunNames
from stoker.errors import BadInput
from stoker.report import comparison
from stoker.run import finding, view


def compare(run: RunNames, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Compare runs: config that differs first, then the last and best of every metric, with small curves."""
    found = {found.path.resolve(): found for found in (finding.find(runs, name) for name in run)}
    if len(found) < 2:
        raise BadInput("give two runs or more to compare; `stoker runs show` is for one")
    compared = comparison.compare([view.load(each) for each in found.values()])
    if json:
        print_json(comparison.as_json(compared))
    else:
        comparison.print_comparison(console(), compared)
