"""`stoker train RECIPE`: start a run, or continue the one of that name."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from stoker import config as configs
from stoker import recipes
from stoker.attempt import Run
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.config import Resolved
from stoker.errors import BadInput, Stopped
from stoker.recipes import Recipe
from stoker.report import html
from stoker.run import directory, view
from stoker.run.view import RunView

log = logging.getLogger("stoker")

_SINKS_TIMEOUT = 60.0

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config values, dotted: lr=3e-4 lora.rank=8"),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A YAML file of config values.")
]
Name = Annotated[
    str | None,
    typer.Option(help="The run's id; the same command with the same name continues it.", show_default="new"),
]
Experiment = Annotated[
    str | None,
    typer.Option(help="The folder of runs that belong together.", show_default="the recipe's name"),
]


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A shipped recipe (llm), or a file with a train(run, config) function."
        ),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    experiment: Experiment = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Start a run; the same command with the same --name continues it.

    Values come from defaults, then --config, then KEY=VALUE. `stoker recipes show llm` lists the keys.
    """
    found = recipes.load(recipe)
    resolved = configs.resolve(found.config, overrides or (), config)
    return start(found, resolved, runs=runs, name=name, experiment=experiment, json=json)


def script_command(train_function: Callable[..., None]) -> Callable[..., int]:
    """The same command for a script's own train function."""

    def command(
        overrides: Overrides = None,
        config: ConfigFile = None,
        name: Name = None,
        experiment: Experiment = None,
        runs: RunsFolder = DEFAULT_RUNS,
        json: Json = False,
    ) -> int:
        found = recipes.from_function(train_function)
        resolved = configs.resolve(found.config, overrides or (), config)
        return start(found, resolved, runs=runs, name=name, experiment=experiment, json=json)

    command.__doc__ = (
        train_function.__doc__ or "Start a run; the same command with the same --name continues it."
    )
    return command


def start(
    recipe: Recipe,
    resolved: Resolved[Any],
    *,
    runs: Path,
    name: str | None,
    experiment: str | None,
    json: bool,
    accept_drift: bool = False,
) -> int:
    """Train, from the beginning or from where the run of that name was; returns the exit code."""
    _show_messages()
    experiment = experiment or recipe.name
    if name is not None:
        finished = _finished(directory.locate(runs.absolute(), experiment, name), resolved)
        if finished is not None:
            return _answer(finished, json, "was finished already")
    seed = int(getattr(resolved.config, "seed", 0))
    run = Run(
        experiment,
        name,
        config=resolved.config,
        runs=runs,
        sources=resolved.sources,
        recipe={"name": recipe.name, "reference": recipe.reference},
        seed=seed,
        code=recipe.source.parent if recipe.reference not in recipes.SHIPPED else Path.cwd(),
        accept_drift=accept_drift,
    )
    code, status = _train(run, recipe, resolved.config)
    if code == 0:  # told to stop, it has no time to lose; the follower goes on by itself
        _wait_for_sinks(run)
    _answer(view.load(run.directory), json, status)
    return code


def _train(run: Run, recipe: Recipe, config: Any) -> tuple[int, str]:
    """Call the recipe within the run; returns the exit code and the status."""
    _seed(run.seed)
    try:
        with run.stop.handled(), run:
            arguments = (run, config) if recipe.config.__name__ != "NoConfig" else (run,)
            recipe.train(*arguments)
            _export_weights(run)
            run.end(view.FINISHED)
            _write_report(run)
    except BadInput:
        run.discard_if_unused()
        raise
    except Stopped as stopped:
        return int(stopped.code or 0), stopped.status
    return 0, view.FINISHED


def _export_weights(run: Run) -> None:
    """Weights of a loop whose recipe has not exported them itself: those of the last checkpoint."""
    from stoker.checkpoint import manifest

    exported = {event["kind"] for event in view.load(run.directory).artifacts.values()}
    found, _ = manifest.newest(run.directory.checkpoints)
    if found is None or exported & {"model", "adapter"}:
        return
    from stoker.checkpoint import store

    run.artifact(store.export_model(found, run.directory.artifacts / "model.safetensors"), kind="model")


def _write_report(run: Run) -> None:
    """The report of a run that is done; that it cannot be written takes nothing away from the run."""
    try:
        report = html.write([view.load(run.directory)], run.directory.artifacts / "report.html")
        run.artifact(report, kind="report")
    except (BadInput, OSError) as error:
        log.warning("%s; `stoker report %s` writes it later", error, run.directory.id)


def _seed(seed: int) -> None:
    """Seed what is loaded: a recipe that imports torch later seeds it itself."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        from stoker.engine.random_state import seed_everything

        seed_everything(seed)


def _finished(found: directory.RunDirectory, resolved: Resolved[Any]) -> RunView | None:
    """A run of this name and config that has come to its end, with its report; else None."""
    seen = view.load(found) if found.exists() else None
    if seen is None or seen.status != view.FINISHED or configs.drift(seen.config, resolved.values):
        return None
    if not (found.artifacts / "report.html").exists():  # it was killed in its very last moment
        html.write([seen], found.artifacts / "report.html")
    return seen


def _wait_for_sinks(run: Run) -> None:
    for state in run.wait_for_sinks(_SINKS_TIMEOUT):
        if state.pending:
            reason = f" ({state.error})" if state.error else ""
            log.warning(
                "%s: %d events are not shipped yet%s; `stoker sync %s` ships them",
                state.name,
                state.pending,
                reason,
                run.directory.id,
            )


def _answer(seen: RunView, json: bool, status: str) -> int:
    """Say how the run ended, where it is, and what to do next."""
    directory_ = seen.directory
    report = directory_.artifacts / "report.html"
    if json:
        print_json({
            "id": directory_.id, "experiment": directory_.experiment, "run": str(directory_.path),
            "status": seen.status, "step": seen.step, "metrics": seen.newest(),
            "artifacts": {n: str(directory_.artifacts / n) for n in seen.artifacts},
            "report": str(report) if report.is_file() else None,
        })  # fmt: skip
        return 0
    out = console()
    out.print(f"\n{directory_.experiment}/{directory_.id} {status} at step {seen.step}")
    for metric, value in seen.newest().items():
        out.print(f"  {metric:24} {value:.6g}")
    out.print(f"  {'run':24} {_shortest(directory_.path)}")
    if report.is_file():
        out.print(f"  {'report':24} {_shortest(report)}")
    if status == view.FINISHED:
        out.print(f"next: stoker runs show {directory_.id}   stoker runs export {directory_.id}   stoker ui")
    else:
        out.print(f"next: stoker resume {directory_.id}   stoker runs show {directory_.id}")
    return 0


def _shortest(path: Path) -> str:
    relative = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return str(relative)


class _StderrHandler(logging.Handler):
    """Writes to what standard error is now: a progress bar puts itself in its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "stoker: " if record.levelno < logging.WARNING else f"stoker: {record.levelname.lower()}: "
        sys.stderr.write(f"{prefix}{record.getMessage()}\n")


def _show_messages() -> None:
    log.propagate = False
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler(logging.INFO))
