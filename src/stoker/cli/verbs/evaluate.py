"""`stoker evaluate RUN|MODEL data=...`: a model's loss and perplexity on data, as its own run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker import config as configs
from stoker import recipes
from stoker.cli.launching import ONE_RANK, Launch, start
from stoker.cli.options import Experiment, Name, Overrides
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder
from stoker.cli.submit import HERE, Command, Where, submittable
from stoker.cli.verbs.generate import OfCheckpoint, RunOrModel, folder_meant, run_meant
from stoker.launch import arguments

_AS_TRAINED = ("columns", "loss_on", "chat_template_kwargs", "quantisation", "sequence_length", "packing")
"""The keys whose defaults an evaluation takes from the run it evaluates."""


@functools.partial(submittable, profile=None)
def evaluate(
    model: RunOrModel,
    overrides: Overrides = None,
    checkpoint: OfCheckpoint = None,
    name: Name = None,
    experiment: Experiment = None,
    launch: Launch = ONE_RANK,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Measure loss and perplexity of a model or an adapter. It can also answer prompts.

    The evaluation is itself a run. `stoker recipes show evaluation` lists the keys. If a run is evaluated,
    its own columns, loss_on, sequence_length and the like are the defaults.
    """
    recipe = recipes.load("evaluation")
    values, origin = _of_run(model, runs, checkpoint)
    if "columns" in values:
        values["columns"] = _of_evaluated(values["columns"], overrides or ())
    resolved = configs.restore(recipe.config, values, dict.fromkeys(values, origin), overrides or ())
    command = Command.of_verb("evaluate")
    return start(
        recipe, resolved, command, launch, where, runs=runs, name=name, experiment=experiment, json=json
    )


def _of_evaluated(columns: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The columns that a run had for all its sources, and for those that are evaluated. Raises BadInput."""
    from stoker.data import sources

    data = arguments.value(overrides, "data")
    names = sources.named(data, evaluated=True) if data else []
    return {name: own for name, own in columns.items() if isinstance(own, str) or name in names}


def _of_run(reference: str, runs: Path, checkpoint: str | None) -> tuple[dict[str, Any], str]:
    """The config values that the model or run implies, and where they come from.

    Raises BadInput if the run has exported no model, or has no such checkpoint.
    """
    seen = run_meant(reference, runs, checkpoint)
    if seen is None:
        return {"model": reference}, configs.COMMAND_LINE
    own = {key: seen.config[key] for key in _AS_TRAINED if key in seen.config}
    origin = f"run {seen.directory.name}"
    return {**own, "model": str(folder_meant(seen, checkpoint))}, origin
