"""One rank of a run: what it checks, trains and leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from stoker import config as configs
from stoker import machine, recipes, signals
from stoker.cli import outcome
from stoker.cli.output import say_error, show_messages
from stoker.config import Resolved
from stoker.engine import deepspeed_file, options, random_state
from stoker.engine.settings import Training
from stoker.errors import EXIT_FAILED, EXIT_PREEMPTED, BadInput, Stopped, stops_as_raised
from stoker.launch import alone, ranks
from stoker.recipes import Recipe
from stoker.report import html
from stoker.run import finding, view
from stoker.status import FINISHED
from stoker.user_run import Run

log = logging.getLogger("stoker")

_WEIGHTS = "model.safetensors"
_SINKS_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """What a rank needs to take part in a run."""

    recipe: str
    """The recipe's reference."""
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    runs: Path
    experiment: str
    name: str | None
    profile: tuple[int, int] | None
    json: bool
    accept_drift: bool
    deadline: float | None = None
    """When to stop, by the machine's monotonic clock."""
    elastic: bool = False
    """Whether ranks that stop may be started again on other machines: the launcher says how it ended."""


def run_rank(job: RankJob, measure: int | None = None) -> int:
    """Run one rank of a job; for `measure`, see `Attempt.measure`."""
    show_messages(logging.INFO if measure is None else logging.WARNING)
    recipe = recipes.load(job.recipe)
    return work(recipe, configs.restore(recipe.config, job.values, job.sources), job, measure)


def work(recipe: Recipe, resolved: Resolved[Any], job: RankJob, measure: int | None = None) -> int:
    """Train as one rank, or as the only one; rank 0 prints the result."""
    run = opened(recipe, resolved, job.experiment, job.name, job.runs, accept_drift=job.accept_drift)
    attempt = run.attempt
    attempt.profile, attempt.measure, attempt.stop.deadline = job.profile, measure, job.deadline
    if run.world.rank > 0:
        ranks.log_to(run.directory.logs / f"rank-{run.world.rank}.log")
    code, status = work_on(run, recipe, resolved.config)
    if run.world.rank > 0 or measure is not None:
        return code
    if code == 0:  # a run that was told to stop must exit quickly; the follower continues by itself
        with signals.cut_short():
            _wait_for_sinks(run)
        code = 0 if run.attempt.uploaded else EXIT_PREEMPTED
    if code == 0 or not job.elastic:
        outcome.show(view.load(run.directory), job.json, status, uploaded=run.attempt.uploaded)
    return code


def opened(
    recipe: Recipe, resolved: Resolved[Any], experiment: str, name: str | None, runs: Path, **more: Any
) -> Run:
    """The run of a recipe, with what it says of itself; `more` is given to `Run` as it is."""
    return Run(
        experiment, name, config=resolved.config, runs=runs, sources=resolved.sources,
        recipe={"name": recipe.name, "reference": recipe.reference},
        seed=int(getattr(resolved.config, "seed", 0)), code=recipe.code, **more,
    )  # fmt: skip


def check(recipe: Recipe, config: Any, ranks: int, gpus: int | None = None) -> None:
    """Refuse a config that cannot work on this number of ranks, before any is started. Raises BadInput.

    Args:
        gpus: the number of GPUs where the run will train; by default those of this machine.
    """
    check_ranks(recipe, config, ranks, gpus)
    if recipe.check is not None:
        recipe.check(config)


def check_ranks(recipe: Recipe, config: Any, ranks: int, gpus: int | None = None) -> None:
    """The quick part of `check`, which depends on the number of ranks. Raises BadInput."""
    if isinstance(config, Training):
        options.check(
            deepspeed_file.completed(config), ranks=ranks,
            gpus=_gpus(config) if gpus is None else gpus,
            batch_size=getattr(config, "batch_size", None),
        )  # fmt: skip
    if recipe.check_ranks is not None:
        recipe.check_ranks(config, ranks)


def _gpus(config: Training) -> int:
    """The number of GPUs of this machine; 0, without importing torch, if no option depends on it."""
    if not (config.backend == "nccl" or config.sync_batchnorm or config.fsdp.offload):
        return 0
    import torch

    return torch.cuda.device_count()


def work_on(run: Run, recipe: Recipe, config: Any, *, trial: bool = False) -> tuple[int, str]:
    """Call the recipe within the run; returns the exit code and the status.

    Args:
        trial: the run is a trial of a sweep: it gets no report of its own, and is ended if it hangs.
    """
    if getattr(config, "deterministic", False):
        machine.keep_cublas_workspaces()  # before the recipe uses CUDA
    random_state.seed_everything(run.seed)  # a recipe that imports torch later seeds it itself
    ends = trial or run.world.size > 1 or getattr(config, "hang_limit", None) is not None
    try:
        with run.attempt.stop.handled(), run, alone.watching(run.attempt, _say_hanging, ends=ends):
            arguments = (run, config) if recipe.config.__name__ != "NoConfig" else (run,)
            with stops_as_raised():
                recipe.train(*arguments)
            run.attempt.conclude()
            if run.world.rank == 0:
                _export_weights(run)
            run.end(FINISHED)
            if run.world.rank == 0 and not trial:
                _write_report(run)
    except BadInput:
        run.attempt.discard_if_unused()
        raise
    except Stopped as stopped:
        return int(stopped.code or 0), stopped.status
    return 0, FINISHED


def _say_hanging(said: str) -> None:
    Console(stderr=True).show_cursor()  # a progress bar that is never closed has hidden it
    say_error(f"{said}; the same command continues from the newest checkpoint", EXIT_FAILED)


def _export_weights(run: Run) -> None:
    """Export the weights of the newest checkpoint, unless the recipe has exported its own."""
    from stoker.checkpoint import manifest

    found, _ = manifest.newest(run.directory.checkpoints)
    if found is None:
        return
    known = view.load(run.directory).artifacts.values()
    others = {event["kind"] for event in known if event["name"] != _WEIGHTS}
    if (run.attempt.made | others) & {"model", "adapter"}:
        return
    from stoker.checkpoint import store

    run.artifact(store.export_model(found, run.directory.artifacts / _WEIGHTS), kind="model")


def _write_report(run: Run) -> None:
    """Write the report of a finished run; a failure to write it does not fail the run."""
    try:
        report = html.write([view.load(run.directory)], run.directory.artifacts / "report.html")
        run.artifact(report, kind="report")
    except (BadInput, OSError) as error:
        log.warning("%s; `stoker report %s` writes it later", error, run.directory.id)


def _wait_for_sinks(run: Run) -> None:
    sync = run.directory.id + finding.option(run.directory.runs)
    for state in run.attempt.wait_for_sinks(_SINKS_TIMEOUT):
        if state.pending:
            reason = f" ({state.error})" if state.error else ""
            log.warning(
                "%s: %d events are not shipped yet%s; ship them with `stoker sync %s`",
                state.name, state.pending, reason, sync,
            )  # fmt: skip
