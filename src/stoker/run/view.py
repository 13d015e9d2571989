"""The view of a run: the fold over its journal.

The journal only grows; what a run is now is computed from it. An attempt that resumes from
step k makes every point past k void, so the view has exactly one point a metric and step:
no gap and no duplicate, whatever was killed when. Where a point was logged twice without a
resume between (a step that was finished, then finished again after the last checkpoint),
the first one stands, as it does in every sink.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stoker.run import journal
from stoker.run.directory import RunDirectory
from stoker.run.journal import Event

FINISHED = "finished"
FAILED = "failed"
PREEMPTED = "preempted"
INTERRUPTED = "interrupted"
RUNNING = "running"
KILLED = "killed"  # its process is gone and said nothing


@dataclass
class Attempt:
    """One process lifetime of a run."""

    number: int
    started: float
    host: str = ""
    pid: int = 0
    resumed_from: int | None = None
    """The step of the checkpoint it continued from; None where it began anew."""
    passed_over: list[str] = field(default_factory=list)
    """Checkpoints that could not be used, each with the reason."""
    drift: dict[str, Any] = field(default_factory=dict)
    """Config keys that differ from the run's record: key -> [old, new]."""
    ended: float | None = None
    last_event: float = 0.0
    status: str = KILLED
    error: str | None = None


@dataclass
class Table:
    """Rows logged under a name at a step."""

    name: str
    step: int
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class RunView:
    """What a run is now."""

    directory: RunDirectory
    record: dict[str, Any]
    attempts: list[Attempt] = field(default_factory=list)
    points: dict[str, dict[int, float]] = field(default_factory=dict)
    """metric -> step -> value, in the order of steps."""
    times: dict[int, float] = field(default_factory=dict)
    """step -> seconds since 1970 at which it was first logged."""
    total_steps: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    """Steps at which a checkpoint was committed (it may have been deleted since)."""
    artifacts: dict[str, Event] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the newest attempt: the record's, with what has drifted since."""
        drifted = self.attempts[-1].drift if self.attempts else {}
        return {**self.record["config"], **{key: new for key, (_, new) in drifted.items()}}

    @property
    def step(self) -> int:
        """The last step that stands."""
        return max((max(series) for series in self.points.values() if series), default=0)

    @property
    def status(self) -> str:
        """running, finished, failed, preempted, interrupted or killed."""
        if not self.attempts:
            return RUNNING if self.directory.alive else KILLED
        last = self.attempts[-1]
        return RUNNING if last.ended is None and self.directory.alive else last.status

    @property
    def started(self) -> float:
        return self.attempts[0].started if self.attempts else self.directory.record_file.stat().st_mtime

    @property
    def seconds(self) -> float:
        """Time spent in all attempts."""
        return sum((a.ended or a.last_event) - a.started for a in self.attempts)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, or None."""
        series = self.points.get(metric)
        return series[max(series)] if series else None

    def summary(self) -> dict[str, float]:
        """The newest value of every metric."""
        return {metric: series[max(series)] for metric, series in sorted(self.points.items()) if series}

    def rows(self) -> list[dict[str, float | int | None]]:
        """A row a step: `step`, then every metric by name, None where it was not logged."""
        metrics = sorted(self.points)
        steps = sorted({step for series in self.points.values() for step in series})
        return [{"step": s, **{m: self.points[m].get(s) for m in metrics}} for s in steps]


def load(directory: RunDirectory) -> RunView:
    """Fold the journal of a run. Raises BadInput where its record cannot be read."""
    view = RunView(directory, directory.record())
    for event in journal.read(directory.journal):
        _fold(view, event)
    for metric, series in view.points.items():
        view.points[metric] = dict(sorted(series.items()))
    return view


def _fold(view: RunView, event: Event) -> None:
    kind = event["type"]
    if not view.attempts or view.attempts[-1].number != event["attempt"]:
        view.attempts.append(Attempt(event["attempt"], event["time"]))  # its first line may be damaged
    if kind == "attempt_started":
        view.attempts[-1] = Attempt(
            event["attempt"], event["time"], event["host"], event["pid"], drift=event.get("drift", {})
        )
    elif kind == "metrics":
        _fold_metrics(view, event)
    elif kind == "resumed":
        _void_after(view, event["step"])
        view.attempts[-1].resumed_from = event["step"] or None
        view.attempts[-1].passed_over = event.get("passed_over", [])
    elif kind == "plan":
        view.total_steps = event["total_steps"]
    elif kind == "checkpoint":
        view.checkpoints.append(event["step"])
    elif kind == "artifact":
        view.artifacts[event["name"]] = event
    elif kind == "table":
        _fold_table(view, event)
    elif kind == "tags":
        view.tags.update(event["tags"])
    elif kind == "attempt_ended":
        last = view.attempts[-1]
        last.ended, last.status, last.error = event["time"], event["status"], event.get("error")
    view.attempts[-1].last_event = event["time"]


def _fold_metrics(view: RunView, event: Event) -> None:
    step = event["step"]
    for metric, value in journal.decode_values(event["values"]).items():
        view.points.setdefault(metric, {}).setdefault(step, value)
    view.times.setdefault(step, event["time"])


def _fold_table(view: RunView, event: Event) -> None:
    table = Table(event["name"], event["step"], event["columns"], event["rows"])
    if not any((t.name, t.step) == (table.name, table.step) for t in view.tables):
        view.tables.append(table)


def _void_after(view: RunView, step: int) -> None:
    for metric, series in view.points.items():
        view.points[metric] = {s: value for s, value in series.items() if s <= step}
    view.points = {metric: series for metric, series in view.points.items() if series}
    view.times = {s: time for s, time in view.times.items() if s <= step}
    view.tables = [t for t in view.tables if t.step <= step]
    view.checkpoints = [s for s in view.checkpoints if s <= step]
