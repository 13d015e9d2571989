"""`stoker.sweep`: a search started from Python, and its result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import recipes, signals
from stoker.cli import searching
from stoker.cli import trials as trials_seen
from stoker.cli.output import messages_shown
from stoker.cli.search_options import Places
from stoker.errors import BadInput, StokerError, Stopped
from stoker.integrations import training
from stoker.launch.targets import LOCAL, RAY
from stoker.run import opening
from stoker.tune import plan
from stoker.tune.search import Search
from stoker.tune.seen import Seen
from stoker.tune.space_reading import parse_mapping


@dataclass(frozen=True)
class Trial:
    """The result of a trial."""

    number: int
    state: str
    """complete, pruned, failed, or paused: a paused trial continues with the search."""
    params: Mapping[str, Any]
    """The trial's values by config key."""
    value: float | None
    """The latest value of the first metric."""
    objectives: Mapping[str, float | None]
    """The latest value of each metric."""
    values: tuple[tuple[float, float], ...]
    """Each logged value of the first metric with its step; with shares of the data, with the share in
    percent."""
    parent: int | None
    """The number of the trial from whose checkpoint population based training started this one."""
    run: Path
    """The directory of the trial's run."""
    error: str
    """The error of a failed trial with its traceback, otherwise empty."""


@dataclass(frozen=True)
class Sweep:
    """The result of a search."""

    folder: Path
    """The folder that contains the runs of the trials; `stoker report` accepts its name."""
    trials: tuple[Trial, ...]
    """The trials in the order in which they were drawn."""
    best: Trial | None
    """The best trial by the first metric; None if no trial has logged it."""
    front: tuple[Trial, ...]
    """The Pareto front: trials that no other trial dominates; with one metric, only the best trial."""
    over: bool
    """Whether nothing is left to do; if not, the same call with more time or budget continues the search."""


@messages_shown()
def sweep(
    recipe: str | Path | Callable[..., None],
    space: Mapping[str | tuple[str, ...], Any],
    *,
    metric: str | Sequence[str] | None = None,
    goal: str | Sequence[str] | None = None,
    trials: int | None = None,
    parallel: int | None = None,
    nproc: int = 1,
    per_gpu: int = 1,
    sampler: str | None = None,
    scheduler: str | None = None,
    strategy: str | None = None,
    least: str | int | None = None,
    most: str | int | None = None,
    factor: int | None = None,
    quantile: float | None = None,
    resample: float | None = None,
    perturb: str | tuple[float, float] | None = None,
    tries: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    warm_start: str = "",
    seed: int = 0,
    max_failures: int | None = None,
    budget: str | int | None = None,
    max_time: str | int | None = None,
    name: str | None = None,
    new: bool = False,
    storage: str = "",
    study: str | None = None,
    on: str = LOCAL,
    address: str | None = None,
    reuse_processes: bool = False,
    runs: Path | str | None = None,
) -> Sweep:
    """Search for the best values of a recipe's keys; the same call resumes the search.

    This is `stoker sweep`, and each argument is the option of the same name, which `stoker sweep --help` and
    docs/sweeps.md describe. Ctrl-C, SIGTERM and SIGHUP end the search with a checkpoint of each running
    trial. Progress is shown as by the command, or logged by the logger `stoker` if logging is set up.

        found = stoker.sweep("image", {"lr": "log(0.01, 1)", "epochs": 2}, metric="val_accuracy", trials=6)
        print(found.best.params, found.best.run)

    Args:
        recipe: a shipped recipe, a file with a `train(run, config)` function, or such a function from a file.
        space: the searched keys, written as for the command, and the values that are the same in all trials.
        metric: the metric to optimise; if there are several, early stopping uses the first. By default that
            by which the recipe keeps its best checkpoint.
        goal: min or max for each metric; by default derived from the metric's name.
        tries: values to try first, for one trial or for several.
        on: local or ray.
        runs: the folder that contains the runs, by default STOKER_RUNS or else `runs`.

    Returns:
        The trials and the best of them.

    Raises:
        BadInput: the search cannot be run as given; nothing was started.
        StokerError: every trial failed, or the search cannot continue, for example after more failed trials
            than `max_failures`.
        Stopped: the search was told to stop, and did; a SystemExit.
    """
    if opening.worker_imports_script() or recipes.loads_file():
        raise BadInput(
            "stoker.sweep is called while a file is imported; call it below if __name__ == '__main__':"
        )
    found = training.recipe_of(recipe)
    searched = parse_mapping(space, found.config)
    if on not in (LOCAL, RAY):
        raise BadInput(f"on={on!r}: give {LOCAL} or {RAY}; to submit jobs, use `stoker sweep --on {on}`")
    asked = searching.Asked(
        recipe=found, space=searched, runs=training.runs_folder(runs), name=name, new=new,
        metric=_several(metric), goal=_several(goal), trials=trials, nproc=nproc, sampler=sampler,
        scheduler=scheduler, strategy=strategy, least=_text(least), most=_text(most), factor=factor,
        quantile=quantile, resample=resample,
        perturb=_factors(perturb),
        tries=tuple(searched.params(values) for values in _several_values(tries)), warm_start=warm_start,
        seed=seed, max_failures=max_failures, budget=_text(budget),
        storage=storage or os.environ.get("STOKER_STORAGE", ""), study=study,
    )  # fmt: skip
    made = searching.prepare(asked)
    places = Places(parallel, address, per_gpu, reuse_processes)
    deadline = plan.deadline(_text(max_time))
    with signals.raised(signals.unanswered()):
        with searching.begun(made, on, places, deadline) as (search, shipping):
            with searching.answering_signals(search) as told, trials_seen.live(search):
                search.run()
            if told:
                raise Stopped(signals.STATUS[told[0]])
        searching.wait_for_sinks(shipping)
    if error := trials_seen.all_failed(search):
        raise StokerError(error)
    return _of(search)


def _several(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _several_values(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return (given,) if isinstance(given, Mapping) else given


def _factors(given: str | Sequence[float] | None) -> str | None:
    return ",".join(map(str, given)) if isinstance(given, tuple | list) else _text(given)


def _text(given: Any) -> str | None:
    return None if given is None else str(given)


def _of(search: Search) -> Sweep:
    by_number = {number: _trial(trial, search) for number, trial in search.trials.items()}
    best = search.best
    return Sweep(
        folder=search.plan.folder,
        trials=tuple(by_number.values()),
        best=None if best is None else by_number[best.number],
        front=tuple(by_number[trial.number] for trial in search.front),
        over=search.over,
    )


def _trial(trial: Seen, search: Search) -> Trial:
    told = trials_seen.told(trial, search)
    return Trial(
        trial.number, told["state"], trial.params, trial.value, told["objectives"],
        tuple((step, value) for step, value in told["values"]), trial.parent, Path(told["run"]),
        f"{trial.error}\n{trial.trace}".strip(),
    )  # fmt: skip
