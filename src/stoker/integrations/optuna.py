"""A stoker recipe as an objective of Optuna's own `study.optimize`.

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.SuccessiveHalvingPruner())
    trained = objective("image", {"lr": "log(1e-4, 1)", "epochs": 2}, metric="val_accuracy")
    study.optimize(trained, n_trials=20)

Each trial is a run, trained in processes of its own: what it needs is given back, what it breaks is its own,
and several threads (`n_jobs`) do not meet. Its id is the trial's user attribute `run`.
"""

from __future__ import annotations

import contextlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from stoker import machine, recipes
from stoker.errors import BadInput, StokerError
from stoker.integrations import training
from stoker.integrations.training import Training
from stoker.run import view
from stoker.tune.space import parse_mapping
from stoker.tune.trial import Ended, Job

_RESTARTS = 3
"""How often a training whose process was killed is started again without having come further."""


def objective(
    recipe: str,
    space: Mapping[str, Any],
    *,
    metric: str = "val_loss",
    runs: Path | str | None = None,
    nproc: int = 1,
    n_jobs: int = 1,
) -> Callable[[optuna.Trial], float]:
    """Make an objective that trains a recipe with the values that a trial suggests.

    Args:
        recipe: a shipped recipe, or a file with a `train(run, config)` function.
        space: what is searched and what is fixed, by config key, written as for `stoker sweep`.
        metric: the objective's value is its newest; each is reported, and the trial pruned if it should be.
        runs: the folder that runs stand under, by default STOKER_RUNS, else `runs`; the study's name is that
            of the experiment.
        nproc: ranks of a training, on this machine; each has a GPU where there are any.
        n_jobs: as given to `study.optimize`: so many trainings share the cores.

    Returns:
        The objective. It raises TrialPruned for a run that ended early, and StokerError for one that failed
        (`study.optimize(..., catch=StokerError)` goes on with the next). A trial that has the user attribute
        `run`, as those have that RetryFailedTrialCallback enqueues, goes on with that run.

    Raises:
        BadInput: the recipe or the space cannot be used, or nothing is searched.
    """
    if nproc < 1 or n_jobs < 1:
        raise BadInput(f"nproc={nproc}, n_jobs={n_jobs}: give 1 or more")
    found = recipes.load(recipe)
    searched = parse_mapping(space, found.config)
    if not searched.parameters:
        raise BadInput(
            "nothing is searched: give a key a range or choices, such as {'lr': 'log(1e-5, 1e-3)'}"
        )
    folder = training.runs_folder(runs)
    gpus = _Gpus(machine.visible_gpus(), nproc)

    def train(trial: optuna.Trial) -> float:
        overrides = searched.overrides(searched.suggest(trial))
        if len(trial.study.directions) > 1:
            raise BadInput(
                "a study of several objectives: this one has one metric; `stoker sweep` has several"
            )
        experiment = _experiment(trial.study.study_name)
        run = trial.user_attrs.get("run") or f"trial-{trial.number:04d}-{uuid.uuid4().hex[:4]}"
        trial.set_user_attr("run", run)
        tags = {"optuna.study": trial.study.study_name, "optuna.trial": str(trial.number)}
        job = training.job_of(
            found, overrides, metric=metric, run=folder / experiment / run, ranks=nproc, tags=tags
        )
        with gpus.taken() as own:
            return _trained(trial, job, lambda: Training(job, ranks=nproc, beside=n_jobs, gpus=own))

    return train


def _trained(trial: optuna.Trial, job: Job, start: Callable[[], Training]) -> float:
    """Train to the end, or to where the trial is pruned; one whose process is killed is started again."""
    seen: dict[int, float] = {}
    for left in reversed(range(_RESTARTS + 1)):
        ended = _attempt(trial, start(), seen)
        if ended.status != "killed" or left == 0:
            break
    if ended.status == view.STOPPED:
        raise optuna.TrialPruned(f"run {job.run} was stopped at step {max(seen)}")
    if ended.status != view.FINISHED:
        raise StokerError(f"run {job.run} {ended.status}: {ended.error}\n{ended.trace}".strip())
    if not seen:
        raise StokerError(
            f"the recipe never logs {job.metrics[0]}: it logs {', '.join(ended.logged) or 'nothing'}; "
            "name one of these as metric="
        )
    return seen[max(seen)]


def _attempt(trial: optuna.Trial, run: Training, seen: dict[int, float]) -> Ended:
    """One attempt at its run; `seen` has what was reported, by step, which is not said again."""
    try:
        while not isinstance(happened := run.next(), Ended):
            if happened is None:
                continue
            if happened.step not in seen:
                trial.report(happened.value, happened.step)
            seen[happened.step] = happened.value
            if trial.should_prune():
                return run.stop()
            run.go_on()
        return happened
    except BaseException:  # Ctrl-C, or the study's storage is gone
        if run.running:
            run.interrupt()
        raise


class _Gpus:
    """Those of this machine, so many a trial."""

    def __init__(self, numbers: list[str], each: int) -> None:
        if numbers and len(numbers) < each:
            raise BadInput(f"nproc={each}: each rank has a GPU, and there are {len(numbers)}")
        self._free, self._each, self._any = numbers, each if numbers else 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self) -> Iterator[list[str]]:
        """Some for one trial, once there are."""
        with self._any:
            self._any.wait_for(lambda: len(self._free) >= self._each)
            own = [self._free.pop(0) for _ in range(self._each)]
        try:
            yield own
        finally:
            with self._any:
                self._free += own
                self._any.notify_all()


def _experiment(study: str) -> str:
    """A study's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", study).strip("-._")[:128] or "study"
