"""`stoker runs compare A B C`: compare the config and metrics of runs."""

from __future__ import annotations

from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import RunsMeant
from stoker.errors import BadInput
from stoker.report import comparison
from stoker.run import reading


def compare(run: RunsMeant, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Compare the configs and metrics of runs. Of a metric, its last and best value and a small curve."""
    views = reading.read(runs, run)
    if len(views) < 2:
        raise BadInput("give at least two runs to compare; for one run use `stoker runs show`")
    compared = comparison.compare(views)
    if json:
        print_json(comparison.as_json(compared))
    else:
        comparison.print_comparison(console(), compared)
