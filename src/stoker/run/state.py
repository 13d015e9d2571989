"""The current state of a run: the data classes that make up the view of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stoker.run.directory import RunDirectory
from stoker.run.journal import Damage, Event
from stoker.run.series import Goal, Series, Summary, summarise
from stoker.status import FAILED, KILLED, RUNNING

if TYPE_CHECKING:
    import pyarrow


@dataclass
class AttemptView:
    """One process lifetime of a run."""

    number: int
    started: float
    host: str = ""
    pid: int = 0
    world: int = 1
    """The number of processes that trained together."""
    machines: int = 1
    """The number of machines they were on; `host` is that of the first process."""
    resumed_from: int | None = None
    """The step of the checkpoint it resumed from; None if it started from scratch."""
    passed_over: list[str] = field(default_factory=list)
    """Checkpoints that could not be used, each with the reason."""
    layout: dict[str, Any] = field(default_factory=dict)
    """How a Trainer used the devices: `parallel`, `precision`, `ranks`, `device`, and why; the `memory_bytes`
    of each; the `peak` that MFU is relative to (`flops`, `source`)."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it trained on, if its recipe reports it: a line per `sources` entry, `rows`, `tokens_per_row`;
    the number of `images` or `texts` of each split."""
    began: float | None = None
    """When a Trainer's loop started."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """How the loop has spent its time: `time`, `step`, `seconds` by purpose, whether it was `over`."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Config keys that differ from the run's record: key -> [old, new]."""
    code: dict[str, str | None] = field(default_factory=dict)
    """Code files that differ from those at the run's start: path -> XXH3, None for a deleted file."""
    ended: float | None = None
    last_event: float = 0.0
    status: str = KILLED
    error: str | None = None
    step: int | None = None
    """The step at which it ended, if a Trainer made the steps and said so."""

    @property
    def seconds(self) -> float:
        """How long it took, or has taken so far; 0 if the clock was set back by more meanwhile."""
        return max(0.0, (self.ended or self.last_event or self.started) - self.started)


@dataclass(frozen=True)
class Media:
    """A table, figure, image, text or histogram that was logged under a name at a step."""

    kind: str
    """table, figure, image, text or histogram."""
    name: str
    step: int
    file: dict[str, Any] | None
    """Path (from the run's directory), size in bytes, SHA-256; None for a histogram."""
    about: dict[str, Any]
    """A table's `columns` and number of `rows`, an image's `caption`, a histogram's `edges` and `counts`."""


@dataclass(frozen=True)
class Use:
    """An artifact that the run used: the run that made it (None if unknown) and its files."""

    name: str
    run: dict[str, str] | None
    files: list[dict[str, Any]]


@dataclass
class LeftOut:
    """A batch that `on_bad_loss` left out."""

    step: int
    samples: list[int]
    """The first and the last one."""
    reason: str
    time: float
    rewound_to: int | None = None
    """The step to whose weights the run went back."""


@dataclass
class RunView:
    """The state of a run when it was read, as by `stoker.runs`; to follow a running run, read it again."""

    directory: RunDirectory
    """Where the run is: `id`, `experiment`, `path`, and subfolders (`artifacts`, `checkpoints`, `logs`)."""
    record: dict[str, Any]
    """The contents of `run.json`, from the run's start: recipe, config with sources, seed, command, code."""
    attempts: list[AttemptView] = field(default_factory=list)
    """The processes that trained it, one after another."""
    points: Mapping[str, Series] = field(default_factory=dict)
    """metric -> step -> value, in the order of steps, without the points that a resume made void.

    For each metric, `x` are the steps, `y` the values and `time` when each was logged (seconds since 1970),
    as NumPy arrays.
    """
    system: Mapping[str, Series] = field(default_factory=dict)
    """Machine metrics: metric -> sample number, from 0, -> value. A resume does not void any."""
    trained: int = 0
    """How many steps a Trainer had made when it last ended or resumed."""
    total_steps: int | None = None
    samples_per_step: float | None = None
    tokens_per_step: float | None = None
    samples_per_epoch: int | None = None
    best: str = "val_loss"
    """The metric that decides which checkpoint is the best."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps at which a checkpoint was committed (it may have been deleted since then)."""
    left_out: list[LeftOut] = field(default_factory=list)
    """The batches that were left out because of their loss, in the order of steps."""
    artifacts: dict[str, Event] = field(default_factory=dict)
    used: dict[str, Use] = field(default_factory=dict)
    used_by: list[dict[str, Any]] = field(default_factory=list)
    """Artifacts of this run that other runs use: `name`, and the `run` that uses it."""
    media: list[Media] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters that the run recorded in addition to its config."""
    goals: dict[str, Goal] = field(default_factory=dict)
    """Whether lower or higher is better, for metrics for which the run set a goal."""
    tags: dict[str, str] = field(default_factory=dict)
    """The current tags, including those set with `stoker runs tag`."""
    notes: list[tuple[float, str]] = field(default_factory=list)
    """The notes: time and text."""
    damage: list[Damage] = field(default_factory=list)
    """Lines of the journal that could not be read."""

    @property
    def config(self) -> dict[str, Any]:
        """The latest attempt's config by dotted key: the recorded config with the changes since."""
        return {**self.record["config"], **{key: new for key, (_, new) in self.drift.items()}}

    @property
    def recipe_name(self) -> str | None:
        """The recipe that it ran; None for a script without one."""
        return (self.record.get("recipe") or {}).get("name")

    @property
    def recipe_reference(self) -> str | None:
        """What `stoker train` loads that recipe by; None for a script without one."""
        return (self.record.get("recipe") or {}).get("reference")

    @property
    def drift(self) -> dict[str, Any]:
        """How the config differs from the recorded one: key -> [old, new].

        An attempt that failed before its loop started (say, a checkpoint did not fit) changes nothing.
        """
        counted = (a for a in reversed(self.attempts) if a.status != FAILED or a.began is not None)
        return next((attempt.drift for attempt in counted), {})

    @property
    def step(self) -> int:
        """The last step that is not void: that of the newest point, or what a Trainer has made by its end.

        A Trainer's run need not log at every step.
        """
        ended_at = self.attempts[-1].step if self.attempts else None
        if ended_at is not None:
            return ended_at
        return max([self.trained, *(int(series.x[-1]) for series in self.points.values() if len(series))])

    @property
    def status(self) -> str:
        """running, finished, failed, preempted, interrupted, paused, stopped or killed."""
        if not self.attempts:
            return RUNNING if self.directory.alive else KILLED
        last = self.attempts[-1]
        return RUNNING if last.ended is None and self.directory.alive else last.status

    @property
    def started(self) -> float:
        """When the run first started, in seconds since 1970."""
        return self.attempts[0].started if self.attempts else self.directory.record_file.stat().st_mtime

    @property
    def seconds(self) -> float:
        """The time spent in all attempts, in seconds."""
        return sum(attempt.seconds for attempt in self.attempts)

    def last(self, metric: str) -> float | None:
        """The latest value of a metric, or None."""
        series = self.points.get(metric)
        return float(series.y[-1]) if series else None

    def newest(self) -> dict[str, float]:
        """The latest value of every metric, by name."""
        return {metric: float(series.y[-1]) for metric, series in sorted(self.points.items())}

    def summary(self) -> dict[str, Summary]:
        """The summary of every metric, by name: last, lowest, highest and best value, each with its step."""
        return {
            metric: summarise(metric, series, self.goals)
            for metric, series in sorted(self.points.items())
            if len(series)
        }

    def metrics(self) -> pyarrow.Table:
        """One row per step at which something was logged, in the order of steps; `.to_pandas()` converts it.

        Columns: `step` (int64), then every metric by name (float64), null where it was not logged; NaN and
        infinities are kept.
        """
        import pyarrow as pa

        metrics = sorted(self.points)
        logged = [self.points[metric] for metric in metrics]
        steps = np.unique(np.concatenate([np.empty(0, np.int64), *(series.x for series in logged)]))
        columns = [pa.array(steps), *(_aligned(series, steps) for series in logged)]
        return pa.Table.from_arrays(columns, ["step", *metrics])


def _aligned(series: Series, steps: NDArray[np.int64]) -> pyarrow.Array:
    """A metric's values at the given steps, which include its own; null at the others."""
    import pyarrow as pa

    at = np.searchsorted(steps, series.x)
    values, missing = np.zeros(len(steps)), np.ones(len(steps), bool)
    values[at], missing[at] = series.y, False
    return pa.array(values, mask=missing, from_pandas=False)  # from_pandas would turn NaN into null
