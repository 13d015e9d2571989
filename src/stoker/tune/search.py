"""The controller of a search: asks the study for trials, has them run, and decides after each report.

What is known stands in two places, each written once: the study has which trials there are and with which
values, the run of each trial what it came to. A controller that was killed reads both and goes on; all that
it decides is a function of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState
from stoker import config as configs
from stoker.checkpoint import manifest
from stoker.errors import StokerError
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.view import RunView
from stoker.tune import forking
from stoker.tune.local import Ended, Report, Workers
from stoker.tune.schedulers import Decision, Known, PopulationBased, Scheduler, State, Trials
from stoker.tune.space import Space
from stoker.tune.study import EARLIER, JournalFile, quiet
from stoker.tune.trial import Job

if TYPE_CHECKING:
    from stoker.tune import on_ray

_RESAMPLE = 0.25  # as in the paper's experiments
_FACTORS = (0.8, 1.2)
_RESTARTS = 3
"""How often a trial whose process was killed is started again without having come further."""
_OF_A_RUN: dict[str, State] = {
    view.FINISHED: "complete", view.STOPPED: "stopped", view.PAUSED: "paused", view.FAILED: "failed"
}  # fmt: skip
_TOLD: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass
class Seen:
    """What is known of a trial, and shown of it."""

    number: int
    params: dict[str, Any]
    """Config values by key."""
    state: State = "running"
    values: dict[float, float] = field(default_factory=dict)
    """Step -> value of the metric, as it was logged."""
    error: str = ""
    trace: str = ""
    killed: int = 0
    """How often in a row without a new report."""
    resumes: bool = False
    """Whether it is to go on from where its process, or an earlier controller, ended."""
    parent: int | None = None
    """The trial from whose checkpoint it began, under population based training."""
    replaces: int | None = None
    """The trial in whose place it was begun then."""

    @property
    def run(self) -> str:
        """The id of its run."""
        return _run_id(self.number)

    @property
    def over(self) -> bool:
        """Whether it has come to its end, whichever that was."""
        return self.state not in ("running", "paused")

    @property
    def value(self) -> float | None:
        """The newest."""
        return next(reversed(self.values.values()), None)


@dataclass(frozen=True)
class Plan:
    """What a search does, beside its space, sampler and scheduler."""

    folder: Path
    """Of the sweep: its trials' runs stand in it."""
    recipe: str
    """The recipe's reference."""
    config: type
    metric: str
    goal: Literal["min", "max"]
    trials: int
    seed: int = 0
    max_failures: int | None = None
    deadline: float | None = None
    """When no more is begun, and what runs stops with a checkpoint; by the machine's monotonic clock."""


class Search:
    """One controller's share of a search."""

    def __init__(
        self,
        plan: Plan,
        space: Space,
        study: Study,
        file: JournalFile,
        scheduler: Scheduler,
        workers: Workers | on_ray.Workers,
    ) -> None:
        self._plan, self._space, self._study, self._file = plan, space, study, file
        self._scheduler, self._workers = scheduler, workers
        self._changed: Callable[[], None] = lambda: None
        self.trials: dict[int, Seen] = {}
        self._ending = False
        self._table: dict[int, Known] = {}
        self._open: dict[int, Trial] = {}
        """Optuna's trials that it was not told the end of."""
        for trial in study.get_trials(deepcopy=False):
            self._take_in(trial)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Search until there is nothing left to do. Raises StokerError where it cannot go on."""
        try:
            while True:
                self._fill()
                if not self._workers.running:
                    break
                for happened in self._workers.wait(self._left()):
                    if isinstance(happened, Report):
                        self._decide(happened)
                    else:
                        self._end(happened)
                    self._changed()
                if self._overdue and not self._ending:
                    self.stop()
        except BaseException:
            self._workers.kill()
            raise
        if not self._ending:
            for number in self._scheduler.given_up(self._known()):
                self._tell(self.trials[number], "stopped")
        self._file.sync()

    def on_change(self, call: Callable[[], None]) -> None:
        """Have something called after everything that happens."""
        self._changed = call

    def stop(self) -> None:
        """Begin nothing more; what runs stops with a checkpoint, and goes on with the search."""
        self._ending = True
        self._workers.stop()

    @property
    def over(self) -> bool:
        """Whether every trial that was planned has come to its end."""
        begun = len(self.trials) >= self._plan.trials
        return begun and all(trial.over for trial in self.trials.values())

    @property
    def best(self) -> Seen | None:
        """The complete trial with the best value; of equals the first."""
        complete = [t for t in self.trials.values() if t.state == "complete" and t.value is not None]
        return min(complete, key=lambda t: (self._lower(t.value or 0.0), t.number), default=None)

    @property
    def _overdue(self) -> bool:
        return self._plan.deadline is not None and time.monotonic() >= self._plan.deadline

    def _left(self) -> float | None:
        if self._plan.deadline is None or self._ending:
            return None
        return max(0.0, self._plan.deadline - time.monotonic())

    def _fill(self) -> None:
        """Start trials as long as there is room and something to be started."""
        while self._workers.free and not self._ending and not self._overdue:
            number = self._next()
            if number is None:
                return
            self.trials[number].state = "running"
            self._workers.start(self._job(self.trials[number]))
            self._changed()

    def _next(self) -> int | None:
        """Which trial is to run now: one that was interrupted, one that is promoted, or a new one."""
        for trial in self.trials.values():
            if trial.resumes:
                trial.resumes = False
                if self._goes_on(trial):
                    return trial.number
        if (forked := self._fork()) is not None:
            return forked
        promoted = self._scheduler.resumes(self._known())
        if promoted is not None:
            return promoted
        begun = sum(trial.parent is None for trial in self.trials.values())
        return self._ask() if begun < self._plan.trials else None

    def _goes_on(self, trial: Seen) -> bool:
        """Whether a trial that was interrupted is to run again.

        Its newest report may be one that nobody has decided upon; and what it reported beyond the
        checkpoint that it goes on from, it will report once more.
        """
        run = self._run_of(trial.number)
        if run is not None:
            known = {**trial.values, **_points(run, self._plan.metric)}
            begins = _begins(run)
            trial.values = {step: value for step, value in sorted(known.items()) if step <= begins}
            self._table.pop(trial.number, None)
        trial.state = "running"
        if not trial.values:
            return True
        decision = self._scheduler.decide(self._known(), trial.number)
        if decision is Decision.PAUSE:
            trial.state = "paused"
        elif decision is Decision.STOP:
            self._tell(trial, "stopped")
        return decision is Decision.CONTINUE

    def _fork(self) -> int | None:
        """Begin a trial in place of one that population based training stopped, where there is one."""
        if not isinstance(self._scheduler, PopulationBased):
            return None
        replaced = {trial.replaces for trial in self.trials.values()}
        for trial in self.trials.values():
            if trial.state == "stopped" and trial.number not in replaced:
                donor = self._scheduler.donor(self._known(), trial.number)
                if donor is not None:
                    number = len(self._study.get_trials(deepcopy=False))
                    step = forking.take_checkpoint(self._directory(donor), self._directory(number))
                    return self._ask(forking.Fork(donor, trial.number, step))
        return None

    # -- the study -----------------------------------------------------------------------------

    def _ask(self, fork: forking.Fork | None = None) -> int:
        """A new trial of the study; a fork's values are near its donor's."""
        with quiet(), self._file.together():
            if fork is not None:
                random = np.random.default_rng([self._plan.seed, len(self.trials)])
                near = self._space.perturbed(
                    self.trials[fork.donor].params, random, resample=_RESAMPLE, factors=_FACTORS
                )
                self._study.enqueue_trial(self._space.params(near), user_attrs=fork.attributes)
            trial = self._study.ask()
            params = self._space.suggest(trial)
            trial.set_user_attr("run", _run_id(trial.number))
        self.trials[trial.number] = Seen(trial.number, params)
        self._open[trial.number] = trial
        self._inherit(trial.number, fork)
        return trial.number

    def _inherit(self, number: int, fork: forking.Fork | None) -> None:
        """Let a trial that was forked have its donor's history."""
        if fork is None:
            return
        trial, donor = self.trials[number], self.trials[fork.donor]
        trial.parent, trial.replaces = fork.donor, fork.replaces
        trial.values = {s: v for s, v in donor.values.items() if s <= fork.step} | trial.values

    def _take_in(self, found: FrozenTrial) -> None:
        """A trial of an earlier controller, from the study and from its run."""
        if found.state == TrialState.WAITING or EARLIER in found.user_attrs:
            return
        seen = Seen(found.number, self._space.suggest(FixedTrial(found.params)))
        self.trials[found.number] = seen
        run = self._run_of(found.number)
        if run is not None:
            seen.values = _points(run, self._plan.metric)
        self._inherit(found.number, forking.of(found))
        if found.state.is_finished():
            seen.state = next(state for state, told in _TOLD.items() if told == found.state)
            seen.error = str(found.user_attrs.get("error", ""))
            seen.trace = str(found.user_attrs.get("trace", ""))
            return
        with quiet():
            self._open[found.number] = Trial(self._study, found._trial_id)
        state = _OF_A_RUN.get(run.status) if run is not None else None
        if state == "paused":
            seen.state = "paused"
        elif state is None:
            seen.resumes = True
        else:
            seen.error = str(run.attempts[-1].error or "") if run is not None and run.attempts else ""
            self._tell(seen, state)

    def _tell(self, trial: Seen, state: State) -> None:
        """Let the study know how a trial ended."""
        trial.state = state
        if state == "complete" and trial.value is None:
            trial.state, trial.error = "failed", f"it ended without a {self._plan.metric}"
        with quiet(), self._file.together():
            open_ = self._open.pop(trial.number)
            for step, value in trial.values.items():
                open_.report(value, int(step))
            if trial.state == "failed":
                open_.set_user_attr("error", trial.error)
                open_.set_user_attr("trace", trial.trace)
            self._study.tell(
                open_, trial.value if trial.state == "complete" else None, state=_TOLD[trial.state]
            )

    # -- what happens to trials ------------------------------------------------------------------

    def _decide(self, report: Report) -> None:
        trial = self.trials[report.number]
        trial.values[float(report.step)] = report.value
        trial.killed = 0
        self._table.pop(report.number, None)
        decision = self._scheduler.decide(self._known(), report.number)
        saves = isinstance(self._scheduler, PopulationBased)  # others may go on from there
        self._workers.answer(report.number, _ANSWERS[decision], save=saves)

    def _end(self, ended: Ended) -> None:
        trial = self.trials[ended.number]
        if ended.status == "killed":
            trial.killed += 1
            if trial.killed <= _RESTARTS:
                trial.resumes = True
                return
        state = _OF_A_RUN.get(ended.status, "failed" if ended.status == "killed" else None)
        if state is None:  # it was told to stop, and goes on with the search
            trial.resumes = not self._ending
        elif state == "paused":
            trial.state = "paused"
        else:
            trial.error, trial.trace = self._error_of(ended), ended.trace
            self._tell(trial, state)
            self._check(ended)

    def _error_of(self, ended: Ended) -> str:
        """What a trial says itself, else what its run does: of one that hung, where its stacks are."""
        run = self._run_of(ended.number) if ended.error and not ended.trace else None
        return (run and run.attempts and run.attempts[-1].error) or ended.error

    def _check(self, ended: Ended) -> None:
        """Whether it makes sense to go on. Raises StokerError."""
        trial, metric = self.trials[ended.number], self._plan.metric
        if ended.status == view.FINISHED and metric not in ended.logged:
            logged = ", ".join(sorted(ended.logged)) or "nothing"
            raise StokerError(
                f"the recipe never logs {metric}: it logs {logged}; name one of these with --metric"
            )
        failures = [t for t in self.trials.values() if t.state == "failed"]
        if self._plan.max_failures is not None and len(failures) > self._plan.max_failures:
            raise StokerError(
                f"{len(failures)} trials failed, more than --max-failures {self._plan.max_failures}; "
                f"trial {trial.number}: {trial.error}"
            )

    def _job(self, trial: Seen) -> Job:
        resolved: Any = configs.resolve(self._plan.config, self._space.overrides(trial.params))
        return Job(
            trial.number, self._plan.recipe, resolved.values, resolved.sources, self._plan.folder.parent,
            self._plan.folder.name, _run_id(trial.number), self._plan.metric,
            self._plan.folder / "provenance",
        )  # fmt: skip

    def _run_of(self, number: int) -> RunView | None:
        run = self._directory(number)
        return view.load(run) if run.exists() else None

    def _directory(self, number: int) -> RunDirectory:
        return finding.locate(self._plan.folder.parent, self._plan.folder.name, _run_id(number))

    def _known(self) -> Trials:
        """What schedulers decide by; made anew of the trials of which something has changed."""
        for trial in self.trials.values():
            known = self._table.get(trial.number)
            if known is None or known.state != trial.state:
                values = {step: self._lower(value) for step, value in trial.values.items()}
                self._table[trial.number] = Known(trial.number, values, trial.state)
        return self._table

    def _lower(self, value: float) -> float:
        """So that smaller is better."""
        return value if self._plan.goal == "min" else -value


_ANSWERS = {Decision.CONTINUE: "continue", Decision.PAUSE: "paused", Decision.STOP: "stopped"}


def _run_id(number: int) -> str:
    return f"trial-{number:04d}"


def _begins(run: RunView) -> float:
    """The step that a run goes on from: of a loop without a Trainer, which keeps its own place, its last."""
    if run.samples_per_step is None:
        return math.inf
    return max(map(manifest.step_of, manifest.committed(run.directory.checkpoints)), default=0)


def _points(run: RunView, metric: str) -> dict[float, float]:
    series = run.points.get(metric)
    if series is None:
        return {}
    return {float(step): value for step, value in series.items() if math.isfinite(value)}
