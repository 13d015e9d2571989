"""`stoker resume RUN`: continue a run as it is recorded; changed keys are recorded as drift."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from stoker import config as configs
from stoker import recipes, redaction
from stoker.cli.launching import ONE_RANK, Launch, start
from stoker.cli.options import Overrides
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder
from stoker.cli.submit import HERE, Command, Where, submittable
from stoker.errors import BadInput
from stoker.launch import again
from stoker.run import finding, view
from stoker.run.state import RunView

log = logging.getLogger("stoker")


@submittable
def resume(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's id, the start of one, experiment/id, or its path.")
    ],
    overrides: Overrides = None,
    launch: Launch = ONE_RANK,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Continue a run from its newest valid checkpoint. Its config is the recorded one.

    KEY=VALUE replaces the recorded value from now on, and is reported as drift.
    """
    command = Command.of_verb("resume")
    found = finding.find(runs, run)
    seen = view.load(found)
    reference = seen.recipe_reference
    if reference is None:
        raise BadInput(
            f"{found.id} was created by a script without a recipe: run that script again with the same name"
        )
    return_to(Path(seen.record["cwd"]))
    if again.imports_from_cwd(seen.record):
        sys.path.insert(0, str(Path.cwd()))
    recipe = recipes.load(reference)
    resolved = configs.restore(recipe.config, seen.config, seen.record["sources"], overrides or ())
    if overrides:
        for key, (old, new) in configs.drift(seen.config, redaction.tree(resolved.values)).items():
            log.warning("drift: %s was %s and is %s from now on", key, configs.shown(old), configs.shown(new))
    nproc = launch.nproc or max(1, _ranks(seen) // launch.nodes.most)
    return start(
        recipe, resolved, command, dataclasses.replace(launch, nproc=nproc), where,
        runs=found.runs, name=found.id, experiment=found.experiment, json=json,
        accept_drift=True,
    )  # fmt: skip


def return_to(folder: Path) -> None:
    """Change to the folder that the run was started in, on which relative paths in its config depend."""
    if folder.is_dir():
        os.chdir(folder)
    else:
        log.warning(
            "the run was started in %s, which no longer exists: relative paths start from the current folder",
            folder,
        )


def _ranks(seen: RunView) -> int:
    """The number of ranks of the last attempt."""
    return seen.attempts[-1].world if seen.attempts else 1
