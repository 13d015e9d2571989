"""The feed: a run's journal as batches for a sink, each point once.

A point is shipped as soon as it is logged, so the first value of a metric at a step counts; values that a
later attempt logs for the same step are skipped. The batches depend on the journal alone: a new follower
reads the journal up to the position that the last one reached, and continues with the same points.
When a run is rebuilt in a sink, points that a later attempt superseded are skipped as well.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker.run import journal
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor, Event
from stoker.run.reduction import Reduction
from stoker.status import FAILED, KILLED, STOPPED
from stoker.tracking.sink import Batch, Ending, Point

BATCH_POINTS = 1000  # the most that MLflow accepts in one request
BATCH_EVENTS = 500
SYSTEM = "system/"
"""Prefix of the names of machine metrics, whose steps are sample numbers."""

_SHIPPED = {"metrics", "system", "media", "artifact", "used", "tags", "params", "note", "attempt_started",
            "begun_from"}  # fmt: skip


class Feed:
    """Reads a journal from `cursor` on; `cursor` advances with every batch taken.

    Up to `folded`, points that a later attempt superseded are skipped, as in the run's view; after it, the
    first value of each point counts.
    """

    def __init__(self, folder: Path, cursor: Cursor, folded: Cursor | None = None) -> None:
        self._folder = folder
        self.cursor = Cursor()
        self._stand = _standing(folder, folded or Cursor())
        self._points: dict[str, set[int]] = {}
        self._media: set[tuple[str, str, int]] = set()
        self._notes: list[tuple[float, str]] = []
        self._artifacts: dict[str, list[dict[str, Any]]] = {}
        self._samples = 0
        self._reductions: dict[int, Reduction] = {}
        self._attempt = 0
        self._ending: Ending | None = None
        self._errors: dict[int, str | None] = {}
        """Of attempts, as their launchers recorded it; they know more than rank 0."""
        self._raised: set[int] = set()
        """The attempts that an exception of a rank has ended."""
        self._known: dict[int, str] = {}
        """How attempts ended that did not end as they should, if their launchers recorded it."""
        self._given_up: set[int] = set()
        """The attempts after which a search has given the run up."""
        self._last_event = 0.0
        for event in journal.read(folder, self.cursor, until=cursor):
            self._add(event, Batch())
        self.cursor = Cursor(dict(cursor.offsets))

    def take(self, until: Cursor | None = None) -> Batch:
        """The next batch, with nothing past `until`; empty if the journal holds nothing new."""
        batch = Batch()
        for count, event in enumerate(journal.read(self._folder, self.cursor, until=until), 1):
            self._add(event, batch)
            if len(batch.points) >= BATCH_POINTS or count >= BATCH_EVENTS:
                break
        return batch

    def ending(self) -> Ending:
        """How the run ended, once its process is gone: killed, unless the journal says otherwise."""
        unsaid = FAILED if self._attempt in self._raised else KILLED
        ending = self._ending or Ending(unsaid, self._last_event)
        if ending.status in (FAILED, KILLED):
            ending = replace(ending, status=self._known.get(self._attempt, ending.status))
        if self._attempt in self._given_up:
            ending = replace(ending, status=STOPPED)
        return replace(ending, error=self._errors.get(self._attempt, ending.error))

    def _add(self, event: Event, batch: Batch) -> None:
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # reported by the view
            kind = event["type"]
            if event["attempt"] != journal.FROM_OUTSIDE:
                self._attend(event)
            if kind == "metrics":
                self._add_points(event, batch)
            elif kind == "system":
                self._add_system(event, batch)
            elif _resumes(event):
                self._stand = self._stand[1:] or self._stand
            elif kind == "media":
                key = (event["kind"], event["name"], event["step"])
                if key not in self._media and event["step"] <= self._stand[0]:
                    self._media.add(key)
                    batch.media.append({"file": None, "about": {}, **event})
            elif kind == "note":
                self._notes.append((event["time"], event["text"]))
                batch.notes = [text for _, text in sorted(self._notes)]
            elif kind == "attempt_started":
                self._attempt, self._ending = event["attempt"], None
                batch.attempt_started = True
                batch.tags.update(_drift(event))
            elif kind in ("attempt_ended", "attempt_failed", "given_up"):
                self._end(event)
            elif kind == "artifact":
                self._add_artifact(event, batch)
            else:
                _add_other(event, batch)

    def _end(self, event: Event) -> None:
        """Take in how an attempt ended, as it says itself, or as is known from outside."""
        if event["type"] == "attempt_ended":
            self._ending = Ending(event["status"], event["time"], event.get("error"))
        elif event["type"] == "attempt_failed":
            self._errors[event["of"]] = event["error"]
            if event.get("raised"):
                self._raised.add(event["of"])
            if event.get("status"):
                self._known[event["of"]] = event["status"]
        else:
            self._given_up.add(event["of"])

    def _attend(self, event: Event) -> None:
        """Track when something last happened, and the number of ranks of each attempt."""
        self._last_event = max(self._last_event, event["time"])
        if event["type"] == "attempt_started":
            self._reductions[event["attempt"]] = Reduction(event.get("world", 1))

    def _add_points(self, event: Event, batch: Batch) -> None:
        step, values = event["step"], journal.decode_values(event["values"])
        if "reduce" in event:
            reduction = self._reductions.setdefault(event["attempt"], Reduction(1))
            values = reduction.add(event["reduce"], step, values, event["rank"])
        elif event["rank"] > 0:
            return
        if step > self._stand[0]:
            return
        for metric, value in values.items():
            steps = self._points.setdefault(metric, set())
            if step not in steps:
                steps.add(step)
                batch.points.append(Point(metric, step, value, event["time"]))

    def _add_artifact(self, event: Event, batch: Batch) -> None:
        """Take an artifact, with the files of those that it replaces since the last batch.

        A killed follower may have shipped any of them.
        """
        name, files = event["name"], list(event["files"])
        skipped = batch.artifacts[name]["replaced"] if name in batch.artifacts else []
        replaced = [*skipped, self._artifacts[name]] if name in self._artifacts else skipped
        batch.artifacts[name] = {"kind": "file", **event, "files": files, "replaced": replaced}
        self._artifacts[name] = files

    def _add_system(self, event: Event, batch: Batch) -> None:
        for metric, value in journal.decode_values(event["values"]).items():
            batch.points.append(Point(f"{SYSTEM}{metric}", self._samples, value, event["time"]))
        self._samples += 1


def pending(folder: Path, cursor: Cursor) -> int:
    """The number of events past the cursor that a sink has not received yet."""
    return sum(event["type"] in _SHIPPED for event in journal.read(folder, cursor))


def position(cursor: Cursor) -> int:
    """The number of bytes of a journal before a cursor."""
    return sum(cursor.offsets.values())


def end(folder: Path) -> Cursor:
    """The present end of a journal."""
    return Cursor(journal.ends(folder))


def reached(cursor: Cursor, goal: Cursor) -> bool:
    """Whether everything before `goal` is also before the cursor."""
    return all(cursor.offsets.get(name, 0) >= offset for name, offset in goal.offsets.items())


def started(directory: RunDirectory) -> float:
    """When a run's first attempt began, or else when the run was created, in seconds since 1970."""
    for event in journal.read(directory.journal, limit=1):
        return float(event["time"])
    return directory.record_file.stat().st_mtime


def _standing(folder: Path, folded: Cursor) -> list[float]:
    """The last step that no later attempt superseded: at the start, then after each resume."""
    events = journal.read(folder, Cursor(), until=folded)
    steps = [event["step"] for event in events if _resumes(event)]
    return [*itertools.accumulate([math.inf, *reversed(steps)], min)][::-1]


def _resumes(event: Event) -> bool:
    return event.get("type") == "resumed" and isinstance(event.get("step"), int)


def _add_other(event: Event, batch: Batch) -> None:
    kind = event["type"]
    if kind == "tags":
        batch.tags.update(event["tags"])
    elif kind == "params":
        batch.params.update(event["values"])
    elif kind == "used":
        batch.used.append(event)
        if event["run"] is not None:
            batch.tags[f"stoker.used.{event['name']}"] = f"{event['run']['experiment']}/{event['run']['id']}"
    elif kind == "begun_from":
        batch.tags["stoker.begun_from"] = f"step {event['step']} of another run's checkpoint"


def _drift(event: Event) -> dict[str, str | None]:
    """The changes to the config in an attempt, as tags, because params cannot be changed in a sink."""
    drift = event.get("drift") or {}
    return {f"stoker.drift.{key}": f"{old} -> {new}" for key, (old, new) in drift.items()}
