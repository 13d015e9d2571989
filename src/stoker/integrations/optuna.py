"""A stoker recipe as an objective of Optuna's own `study.optimize`.

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.SuccessiveHalvingPruner())
    trained = objective("image", {"lr": "log(1e-4, 1)", "epochs": 2}, metric="val_accuracy")
    study.optimize(trained, n_trials=20)

Each trial is a run, trained in separate processes: its memory is released afterwards, its failures are
isolated, and several threads (`n_jobs`) do not interfere. The run's id is the trial's user attribute `run`.
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
from stoker import machine
from stoker.errors import BadInput, StokerError
from stoker.integrations import training
from stoker.integrations.training import DrivenRun
from stoker.run import finding, view
from stoker.status import FINISHED, STOPPED
from stoker.tune.seen import points
from stoker.tune.space_reading import parse_mapping
from stoker.tune.trial import Ended, TrialJob

_RESTARTS = 3
"""How often a training whose process was killed is restarted without having made progress."""


def objective(
    recipe: str | Path | Callable[..., None],
    space: Mapping[str, Any],
    *,
    metric: str = "val_loss",
    runs: Path | str | None = None,
    nproc: int = 1,
    n_jobs: int = 1,
) -> Callable[[optuna.Trial], float]:
    """Make an objective that trains a recipe with the values that a trial suggests.

    Args:
        recipe: a shipped recipe, a file with a `train(run, config)` function, or such a function from a file.
        space: the searched and the fixed values by config key, written as for `stoker sweep`.
        metric: the metric whose latest value is the objective; every value is reported, and the trial is
            pruned if its pruner says so.
        runs: the folder that contains the runs, by default STOKER_RUNS or else `runs`; the experiment has the
            name of the study.
        nproc: the number of ranks per training, on this machine; each rank has a GPU if there are any.
        n_jobs: the same as for `study.optimize`: this many trainings share the cores.

    Returns:
        The objective. It raises TrialPruned for a run that ended early, and StokerError for one that failed
        (`study.optimize(..., catch=StokerError)` continues with the next trial). A trial with the user
        attribute `run`, such as those that RetryFailedTrialCallback enqueues, resumes that run.

    Raises:
        BadInput: the recipe or the space cannot be used, or there is nothing to search.
    """
    if nproc < 1 or n_jobs < 1:
        raise BadInput(f"nproc={nproc}, n_jobs={n_jobs}: must be at least 1")
    found = training.recipe_of(recipe)
    searched = parse_mapping(space, found.config)
    if not searched.parameters:
        raise BadInput("nothing is searched: give a key a range or choices, as in {'lr': 'log(1e-5, 1e-3)'}")
    folder = training.runs_folder(runs)
    gpus = _Gpus(machine.visible_gpus(), nproc)

    def train(trial: optuna.Trial) -> float:
        overrides = searched.overrides(searched.suggest(trial))
        if len(trial.study.directions) > 1:
            raise BadInput(
                "the study has several objectives, and this one has one metric; `stoker sweep` takes several"
            )
        experiment = _experiment(trial.study.study_name)
        run = trial.user_attrs.get("run") or f"trial-{trial.number:04d}-{uuid.uuid4().hex[:4]}"
        trial.set_user_attr("run", run)
        tags = {"optuna.study": trial.study.study_name, "optuna.trial": str(trial.number)}
        job = training.job_of(
            found, overrides, metric=metric, run=folder / experiment / run, ranks=nproc, tags=tags
        )
        with gpus.taken() as own:
            return _trained(trial, job, lambda: DrivenRun(job, ranks=nproc, beside=n_jobs, gpus=own))

    return train


def _trained(trial: optuna.Trial, job: TrialJob, start: Callable[[], DrivenRun]) -> float:
    """Train to the end, or until the trial is pruned; a training whose process is killed is restarted."""
    seen: dict[float, float] = {}
    for left in reversed(range(_RESTARTS + 1)):
        ended = _attempt(trial, start(), seen)
        if ended.status != "killed" or left == 0:
            break
    if ended.status == STOPPED:
        raise optuna.TrialPruned(f"run {job.run} was stopped at step {max(seen)}")
    if ended.status != FINISHED:
        raise StokerError(f"run {job.run} {ended.status}: {ended.error}\n{ended.trace}".strip())
    known = seen or _logged(job)
    if not known:
        raise StokerError(
            f"the recipe never logs {job.metrics[0]}: it logs {', '.join(ended.logged) or 'nothing'}; "
            "set metric= to one of these"
        )
    return known[max(known)]


def _logged(job: TrialJob) -> dict[float, float]:
    """The values by step that a run has logged, also in a process that was killed before the run's end."""
    return points(view.load(finding.locate(job.runs, job.sweep, job.run)), job.metrics[0])


def _attempt(trial: optuna.Trial, run: DrivenRun, seen: dict[float, float]) -> Ended:
    """One attempt at the run; `seen` has the values by step that were reported and are not reported again."""
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
    """The GPUs of this machine, so many per trial."""

    def __init__(self, numbers: list[str], each: int) -> None:
        if numbers and len(numbers) < each:
            raise BadInput(f"nproc={each}: each rank needs a GPU, and there are {len(numbers)}")
        self._free, self._each, self._any = numbers, each if numbers else 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self) -> Iterator[list[str]]:
        """GPUs for one trial, once enough are free."""
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
    """A study's name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", study).strip("-._")[:128] or "study"
