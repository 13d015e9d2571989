"""`stoker sync RUN`: ship what is pending now."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.errors import EXIT_FAILED, BadInput
from stoker.run import directory
from stoker.tracking import follower

_TIMEOUT = 600.0


def sync(
    run: Annotated[str, typer.Argument(help="A run's id, the start of one, experiment/id, or its path.")],
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Ship what a sink does not have yet, and wait until it has it.

    A follower that is at work on the run already is waited for. Exits with 1 where a sink fails.
    """
    found = directory.find(runs, run)
    process = follower.spawn(found)
    if process is None:
        raise BadInput("STOKER_SINKS=none turns the sinks off: there is nothing to ship to")
    states = follower.wait(found, process, _TIMEOUT)
    pending = sum(state.pending for state in states)
    if json:
        print_json({
            "run": str(found.path), "pending": pending,
            "sinks": [dataclasses.asdict(state) for state in states],
        })  # fmt: skip
    else:
        for state in states:
            said = f"{state.pending} events pending: {state.error}" if state.pending else "complete"
            console().print(f"{state.name}  {said}  {state.where}")
    return EXIT_FAILED if pending else 0
