"""`stoker train RECIPE`: start a run, or continue the run with the given name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from stoker import config as configs
from stoker import recipes
from stoker.cli.launching import ONE_RANK, Launch, start
from stoker.cli.options import ConfigFile, Experiment, Name, Overrides
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder
from stoker.cli.submit import HERE, Command, Where, submittable


@submittable
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe (llm, image, text), or a file with a train(run, config) function.",
        ),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    experiment: Experiment = None,
    launch: Launch = ONE_RANK,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Start a run, or continue the one with the same --name.

    Values come from defaults, then --config, then KEY=VALUE. `stoker recipes show llm` lists the keys.
    """
    found = recipes.load(recipe)
    resolved = configs.resolve(found.config, overrides or (), recipes.config_file(config))
    command = Command.of_verb("train")
    return start(
        found, resolved, command, launch, where, runs=runs, name=name, experiment=experiment, json=json
    )


def script_command(train_function: Callable[..., None]) -> Callable[..., int]:
    """The train command for a script's own train function."""

    @submittable
    def train(
        overrides: Overrides = None,
        config: ConfigFile = None,
        name: Name = None,
        experiment: Experiment = None,
        launch: Launch = ONE_RANK,
        runs: RunsFolder = DEFAULT_RUNS,
        json: Json = False,
        where: Where = HERE,
    ) -> int:
        found = recipes.from_function(train_function)
        resolved = configs.resolve(found.config, overrides or (), recipes.config_file(config))
        command = Command.of_script(found.source)
        return start(
            found, resolved, command, launch, where, runs=runs, name=name, experiment=experiment, json=json
        )

    train.__doc__ = train_function.__doc__ or "Start a run, or continue the one with the same --name."
    return train
