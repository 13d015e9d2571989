"""`stoker runs rm RUN...`: delete runs, after asking for confirmation."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Annotated

import typer
from stoker import storage, words
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import RunNames
from stoker.errors import BadInput
from stoker.run import artifacts, finding, mirror, opening
from stoker.run.directory import RunDirectory
from stoker.words import counted

log = logging.getLogger("stoker")


def remove(
    run: RunNames,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Delete runs with their checkpoints and artifacts. What was shipped to a sink stays there."""
    found = list(
        {found.path.resolve(): found for found in (finding.find(runs, name) for name in run)}.values()
    )
    for each in found:
        if each.alive:
            raise BadInput(f"run {each.id!r} is being trained now: stop it first")
    sizes = [sum(file.stat().st_size for file in storage.files_under(each.path)) for each in found]
    _tell_of_trials(found)
    if not yes:
        _ask(found, sizes)
    for each in found:
        _delete(each)
    freed = artifacts.collect_garbage(runs)
    if json:
        print_json({"removed": [str(each.path) for each in found], "bytes": sum(sizes) + freed})
        return
    for each, size in zip(found, sizes, strict=True):
        console().print(f"removed {each.name}, {words.size(size)}", markup=False)


def _tell_of_trials(found: list[RunDirectory]) -> None:
    trials = Counter(each.path.parent.name for each in found if each.is_trial)
    for sweep, count in trials.items():
        log.warning(
            "%s of the sweep %s: its study keeps what they came to, and a trial that has not ended would be "
            "trained again from its start",
            counted(count, "trial"), sweep,
        )  # fmt: skip


def _ask(found: list[RunDirectory], sizes: list[int]) -> None:
    if not sys.stdin.isatty():
        raise BadInput("standard input is not a terminal to ask for confirmation: add --yes to delete")
    for each, size in zip(found, sizes, strict=True):
        console().print(f"  {each.name}  {words.size(size)}", markup=False)
    typer.confirm(f"delete {counted(len(found), 'run')} permanently?", abort=True)


def _delete(run: RunDirectory) -> None:
    """Delete a run under its lock, so that no process can start training it meanwhile."""
    with opening.kept_from_training(run):
        run.record_file.unlink()  # first: without its record the folder is no longer a run
        mirror.remove(run)
