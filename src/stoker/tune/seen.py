"""What the controller knows about a trial: from the study, from its run, and from its process's reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from stoker import duration
from stoker.checkpoint import manifest
from stoker.run.state import RunView
from stoker.status import FINISHED
from stoker.tune.plan import SHARE, Objective, Plan
from stoker.tune.promising import NEWEST
from stoker.tune.schedulers import Known, State

ENDED: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"
}  # fmt: skip
"""The state of an ended trial, by its state in the study."""


@dataclass
class Seen:
    """A trial as the controller knows and displays it."""

    number: int
    params: dict[str, Any]
    """Config values by key."""
    state: State = "running"
    values: dict[float, float] = field(default_factory=dict)
    """Step -> value of the first objective, as logged. For training on shares, share in percent -> value."""
    others: dict[str, float] = field(default_factory=dict)
    """The newest logged values of the objectives, by metric."""
    per_step: float = 1.0
    """How much of the unit that schedulers count by one step is."""
    origin: tuple[float, float] = (0.0, 0.0)
    """The step at which it started, and its donor's training up to there in the unit of the schedulers."""
    written: float = -1.0
    """The newest step whose value has been written to the study."""
    spent: float = 0.0
    """The total lifetime in seconds of its processes that have ended."""
    error: str = ""
    trace: str = ""
    furthest: float = 0.0
    """The largest step that it has reported, or of which it had a checkpoint when it was killed."""
    killed: int = 0
    """How often in a row its processes were killed without getting past `furthest`."""
    resumes: bool = False
    """Whether it is to be resumed because its process, or an earlier controller, ended."""
    share: float | None = None
    """The share of the data, in percent, that it trains on now or did last; None if not trained on shares."""
    donor: int | None = None
    """If population based training stops it: the trial whose checkpoint its replacement starts from."""
    parent: int | None = None
    """The trial from whose checkpoint population based training started it."""
    replaces: int | None = None
    """The trial that it replaces under population based training."""

    @property
    def run(self) -> str:
        """The id of its run; if it is trained on shares of the data, of the newest one."""
        return run_id(self.number, self.share)

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever state."""
        return self.state not in ("running", "paused")

    @property
    def failed_at_once(self) -> bool:
        """Whether it is a fork that failed before it reported anything of its own."""
        return self.parent is not None and self.state == "failed" and self.step <= self.origin[0]

    @property
    def unfit(self) -> bool:
        """Whether it is a fork whose model or optimizer is another than that of its donor's checkpoint."""
        return self.failed_at_once and manifest.says_unfit(self.error)

    @property
    def value(self) -> float | None:
        """The newest value; None before the first."""
        return next(reversed(self.values.values()), None)

    @property
    def step(self) -> float:
        """The newest step; 0 before its first report."""
        return max(self.values, default=0.0)

    @property
    def done(self) -> float:
        """How much it has trained itself, in the unit of the schedulers, without its donor's part."""
        if self.share is not None:  # each share is trained from scratch
            return sum(self.values)
        return max(0.0, self.amount(self.step) - self.origin[1])

    def amount(self, step: float) -> float:
        """The resource reached at a step, in the unit of the schedulers, including its donor's part."""
        begun, before = self.origin
        return before + (step - begun) * self.per_step if step >= begun else before * step / begun

    def known(self, objective: Objective) -> Known:
        """The trial as schedulers know it."""
        values = {self.amount(step): objective.lower(value) for step, value in self.values.items()}
        return Known(self.number, values, self.state)

    def outcome(self, objectives: Iterable[Objective]) -> list[float | None]:
        """The newest value of each objective; None if it has none."""
        others = itertools.islice(objectives, 1, None)
        return [self.value, *(self.others.get(one.metric) for one in others)]

    def lower(self, objectives: Sequence[Objective]) -> list[float]:
        """The newest value of each objective, negated if needed so that smaller is better; inf if missing."""
        found = zip(objectives, self.outcome(objectives), strict=True)
        return [math.inf if value is None else one.lower(value) for one, value in found]


def run_id(number: int, share: float | None = None) -> str:
    """The id of a trial's run, or of its run on a share of the data."""
    return f"trial-{number:04d}" + (f"-on-{share:.4g}" if share is not None and share < 100 else "")


def recall(trial: Seen, found: FrozenTrial, plan: Plan) -> None:
    """Add to a trial what the study knows about it."""
    told = found.user_attrs
    known = found.intermediate_values.items() or told.get("values", ())
    trial.values = {**{float(step): value for step, value in sorted(known)}, **trial.values}
    newest = found.values or told.get(NEWEST, {}).get("values") or ([trial.value] if trial.values else [])
    trial.others = {
        **dict(zip((one.metric for one in plan.objectives), newest, strict=False)),
        **trial.others,
    }
    steps, done = trial.step - told.get("fork", {}).get("step", 0), told.get("spent", {}).get(plan.unit)
    if plan.unit != SHARE and steps > 0 and done is not None:
        trial.per_step = done / steps


def begins(run: RunView) -> float:
    """The step from which a run resumes; infinite without a Trainer, as the loop keeps its own position."""
    if run.samples_per_step is None:
        return math.inf
    return max(map(manifest.step_of, manifest.committed(run.directory.checkpoints)), default=0)


def points(run: RunView, metric: str) -> dict[float, float]:
    """The finite values of a metric, by step; without what is measured before a Trainer's first step."""
    series = run.points.get(metric)
    if series is None:
        return {}
    least = -math.inf if run.samples_per_step is None else 1
    return {float(step): value for step, value in series.items() if math.isfinite(value) and step >= least}


def newest(run: RunView, objectives: Iterable[Objective]) -> dict[str, float]:
    """The newest values of the objectives that a run has logged, by metric."""
    found = {one.metric: run.last(one.metric) for one in objectives}
    return {metric: value for metric, value in found.items() if value is not None}


def trained_since(trial: FrozenTrial, run: RunView, objectives: Sequence[Objective]) -> bool:
    """Whether a trial that had ended was resumed after that and trained to its end, with all objectives.

    Its run may say that it finished before, too: of several ranks, one failed after that, or it lacked a
    value.
    """
    ended = trial.datetime_complete
    if run.status != FINISHED or ended is None or run.attempts[-1].started < ended.timestamp():
        return False
    values = [run.last(one.metric) for one in objectives]
    whole = all(value is not None and math.isfinite(value) for value in values)
    return whole and bool(points(run, objectives[0].metric))


def spent(run: RunView) -> float:
    """The total seconds of a run's processes, over all attempts."""
    return sum(attempt.seconds * attempt.world for attempt in run.attempts)


def per_step(run: RunView, unit: str) -> float | None:
    """How much of a unit one step of a run is; None if the run does not record it."""
    return duration.of_a_step(
        unit, samples=run.samples_per_step, tokens=run.tokens_per_step,
        samples_per_epoch=run.samples_per_epoch,
    )  # fmt: skip
