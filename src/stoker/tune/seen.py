"""What is known of a trial: from the study, from its run, and from what its process reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState
from stoker import duration
from stoker.checkpoint import manifest
from stoker.run.view import RunView
from stoker.tune.plan import Objective
from stoker.tune.schedulers import Known, State

ENDED: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"
}  # fmt: skip
"""How a trial ended, by what the study says."""


@dataclass
class Seen:
    """A trial, as the controller knows and shows it."""

    number: int
    params: dict[str, Any]
    """Config values by key."""
    state: State = "running"
    values: dict[float, float] = field(default_factory=dict)
    """Step -> value of the first objective, as it was logged."""
    others: dict[str, float] = field(default_factory=dict)
    """The newest values of the objectives by metric, as far as it has logged them."""
    per_step: float = 1.0
    """How much of the unit that schedulers count by a step is."""
    origin: tuple[float, float] = (0.0, 0.0)
    """The step that it began at and how much of the unit that was, which a donor has done."""
    written: float = -1.0
    """The newest step whose value the study has."""
    spent: float = 0.0
    """Seconds of its processes that have ended, each counted for as long as it lived."""
    error: str = ""
    trace: str = ""
    furthest: float = 0.0
    """The largest step that it ever reported."""
    killed: int = 0
    """How often in a row without coming further than that."""
    resumes: bool = False
    """Whether it is to go on from where its process, or an earlier controller, ended."""
    share: float | None = None
    """The share of the data, in percent, that it was trained on last or is now, where that is what counts."""
    donor: int | None = None
    """Of one that population based training stops: the trial that another is to begin from in its place."""
    parent: int | None = None
    """The trial from whose checkpoint it began, under population based training."""
    replaces: int | None = None
    """The trial in whose place it was begun then."""

    @property
    def run(self) -> str:
        """The id of its run; of one that is trained on shares of the data, of the newest."""
        return run_id(self.number, self.share)

    @property
    def over(self) -> bool:
        """Whether it has come to its end, whichever that was."""
        return self.state not in ("running", "paused")

    @property
    def value(self) -> float | None:
        """The newest."""
        return next(reversed(self.values.values()), None)

    @property
    def step(self) -> float:
        """How far it is; 0 before its first report."""
        return max(self.values, default=0.0)

    @property
    def done(self) -> float:
        """How much of the unit it has done itself, without what its donor did."""
        if self.share is not None:  # each share is a training of its own
            return sum(self.values)
        return max(0.0, self.amount(self.step) - self.origin[1])

    def amount(self, step: float) -> float:
        """How much of the unit that schedulers count by is done at a step."""
        begun, before = self.origin
        return before + (step - begun) * self.per_step if step >= begun else before * step / begun

    def known(self, objective: Objective) -> Known:
        """What schedulers decide by."""
        values = {self.amount(step): objective.lower(value) for step, value in self.values.items()}
        return Known(self.number, values, self.state)

    def outcome(self, objectives: Iterable[Objective]) -> list[float | None]:
        """The newest value of each objective."""
        others = itertools.islice(objectives, 1, None)
        return [self.value, *(self.others.get(one.metric) for one in others)]

    def lower(self, objectives: Sequence[Objective]) -> list[float]:
        """The newest values of all objectives, so that smaller is better; one that lacks is the worst."""
        found = zip(objectives, self.outcome(objectives), strict=True)
        return [math.inf if value is None else one.lower(value) for one, value in found]


def run_id(number: int, share: float | None = None) -> str:
    """The id of a trial's run, of that on a share of the data."""
    return f"trial-{number:04d}" + (f"-on-{share:.4g}" if share is not None and share < 100 else "")


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is as good as the other in all objectives (smaller is better), and better in some."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def begins(run: RunView) -> float:
    """The step that a run goes on from: of a loop without a Trainer, which keeps its own place, its last."""
    if run.samples_per_step is None:
        return math.inf
    return max(map(manifest.step_of, manifest.committed(run.directory.checkpoints)), default=0)


def points(run: RunView, metric: str) -> dict[float, float]:
    """The finite values of a metric by step."""
    series = run.points.get(metric)
    if series is None:
        return {}
    return {float(step): value for step, value in series.items() if math.isfinite(value)}


def newest(run: RunView, objectives: Iterable[Objective]) -> dict[str, float]:
    """The newest values of these, as far as it has logged them."""
    found = {one.metric: run.last(one.metric) for one in objectives}
    return {metric: value for metric, value in found.items() if value is not None}


def spent(run: RunView) -> float:
    """Seconds of all of its processes."""
    return sum(((a.ended or a.last_event) - a.started) * a.world for a in run.attempts)


def per_step(run: RunView, unit: str) -> float | None:
    """How much of a unit one step of a run is, where it says."""
    return duration.of_a_step(
        unit, samples=run.samples_per_step, tokens=run.tokens_per_step,
        samples_per_epoch=run.samples_per_epoch,
    )  # fmt: skip
