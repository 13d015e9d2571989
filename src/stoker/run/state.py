"""What a run is now: the words that the view of a run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stoker.run.directory import RunDirectory
from stoker.run.journal import Damage, Event
from stoker.run.series import Goal, Series, Summary, summarise

if TYPE_CHECKING:
    import pyarrow

FINISHED = "finished"
FAILED = "failed"
PREEMPTED = "preempted"
INTERRUPTED = "interrupted"
PAUSED = "paused"  # by a search, to go on later
STOPPED = "stopped"  # by a search, early and for good
RUNNING = "running"
KILLED = "killed"  # its process is gone and said nothing


@dataclass
class Attempt:
    """One process lifetime of a run."""

    number: int
    started: float
    host: str = ""
    pid: int = 0
    world: int = 1
    """How many processes trained together."""
    resumed_from: int | None = None
    """The step of the checkpoint it continued from; None where it began anew."""
    passed_over: list[str] = field(default_factory=list)
    """Checkpoints that could not be used, each with the reason."""
    layout: dict[str, Any] = field(default_factory=dict)
    """How a Trainer used the devices: `parallel`, `precision`, `ranks`, `device`, and why; the `memory_bytes`
    of each; the `peak` that MFU is a share of (`flops`, `source`)."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it trained on, where its recipe says: a line on each of `sources`, `rows`, `tokens_per_row`."""
    began: float | None = None
    """When a Trainer's loop began."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """What the loop had spent its time on: `time`, `step`, `seconds` by what for, whether it was `over`."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Config keys that differ from the run's record: key -> [old, new]."""
    code: dict[str, str | None] = field(default_factory=dict)
    """Files of code that are others than those of the run's begin: path -> XXH3, None where it is gone."""
    ended: float | None = None
    last_event: float = 0.0
    status: str = KILLED
    error: str | None = None


@dataclass(frozen=True)
class Media:
    """Something to look at that was logged under a name at a step."""

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
    """An artifact that the run used: the run that made it (None where that is not known), its files."""

    name: str
    run: dict[str, str] | None
    files: list[dict[str, Any]]


@dataclass
class RunView:
    """What a run was when it was read, as by `stoker.runs`; a living one goes on meanwhile: read it again."""

    directory: RunDirectory
    """Where it is: `id`, `experiment`, `path`, and the paths below (`artifacts`, `checkpoints`, `logs`)."""
    record: dict[str, Any]
    """What `run.json` says of its begin: recipe, config and the source of each value, seed, command, code."""
    attempts: list[Attempt] = field(default_factory=list)
    """The processes that trained it, one after another."""
    points: Mapping[str, Series] = field(default_factory=dict)
    """metric -> step -> value, in the order of steps, without the points that a resume made void.

    Of a metric, `x` are the steps, `y` the values and `time` when each was logged (seconds since 1970), as
    arrays of NumPy.
    """
    system: Mapping[str, Series] = field(default_factory=dict)
    """What the machine did: metric -> sample number, from 0, -> value. A resume voids none."""
    total_steps: int | None = None
    samples_per_step: float | None = None
    tokens_per_step: float | None = None
    samples_per_epoch: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    """Steps at which a checkpoint was committed (it may have been deleted since)."""
    artifacts: dict[str, Event] = field(default_factory=dict)
    used: dict[str, Use] = field(default_factory=dict)
    used_by: list[dict[str, Any]] = field(default_factory=list)
    """Artifacts of this run that others use: `name`, and the `run` that does."""
    media: list[Media] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    """What the run said of itself besides its config."""
    goals: dict[str, Goal] = field(default_factory=dict)
    """Which way a metric is better, where the run said so."""
    tags: dict[str, str] = field(default_factory=dict)
    """As they are now, also those that `stoker runs tag` has set."""
    notes: list[tuple[float, str]] = field(default_factory=list)
    """When and what."""
    damage: list[Damage] = field(default_factory=list)
    """Lines of the journal that could not be read."""

    @property
    def config(self) -> dict[str, Any]:
        """The newest attempt's config by dotted key: the record's, with what has drifted since."""
        return {**self.record["config"], **{key: new for key, (_, new) in self.drift.items()}}

    @property
    def drift(self) -> dict[str, Any]:
        """How the config differs from the record's: key -> [old, new].

        An attempt that failed before its loop began (a checkpoint did not fit, say) changed nothing.
        """
        counted = (a for a in reversed(self.attempts) if a.status != FAILED or a.began is not None)
        return next((attempt.drift for attempt in counted), {})

    @property
    def step(self) -> int:
        """The last step that stands."""
        return max((int(series.x[-1]) for series in self.points.values() if len(series)), default=0)

    @property
    def status(self) -> str:
        """running, finished, failed, preempted, interrupted, paused, stopped or killed."""
        if not self.attempts:
            return RUNNING if self.directory.alive else KILLED
        last = self.attempts[-1]
        return RUNNING if last.ended is None and self.directory.alive else last.status

    @property
    def started(self) -> float:
        """When it first began, in seconds since 1970."""
        return self.attempts[0].started if self.attempts else self.directory.record_file.stat().st_mtime

    @property
    def seconds(self) -> float:
        """Time spent in all attempts."""
        return sum((a.ended or a.last_event) - a.started for a in self.attempts)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, or None."""
        series = self.points.get(metric)
        return float(series.y[-1]) if series else None

    def newest(self) -> dict[str, float]:
        """The newest value of every metric, by name."""
        return {metric: float(series.y[-1]) for metric, series in sorted(self.points.items())}

    def summary(self) -> dict[str, Summary]:
        """What every metric came to, by name: last, lowest, highest and best value, each with its step."""
        return {
            metric: summarise(metric, series, self.goals)
            for metric, series in sorted(self.points.items())
            if len(series)
        }

    def metrics(self) -> pyarrow.Table:
        """A row a step at which something was logged, in the order of steps; a DataFrame by `.to_pandas()`.

        Columns: `step` (int64), then every metric by name (float64), null where it was not logged; NaN and
        infinities are themselves.
        """
        import pyarrow as pa

        metrics = sorted(self.points)
        logged = [self.points[metric] for metric in metrics]
        steps = np.unique(np.concatenate([np.empty(0, np.int64), *(series.x for series in logged)]))
        columns = [pa.array(steps), *(_aligned(series, steps) for series in logged)]
        return pa.Table.from_arrays(columns, ["step", *metrics])


def _aligned(series: Series, steps: NDArray[np.int64]) -> pyarrow.Array:
    """A metric's values at steps of which its own are part, null at the others."""
    import pyarrow as pa

    at = np.searchsorted(steps, series.x)
    values, missing = np.zeros(len(steps)), np.ones(len(steps), bool)
    values[at], missing[at] = series.y, False
    return pa.array(values, mask=missing, from_pandas=False)  # of pandas, NaN would be null too
