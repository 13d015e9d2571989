"""The feed: a run's journal as batches for a sink, each point once.

A point ships as soon as it is logged, so the first one of a metric and step stands: what a
later attempt logs again at that step is left out. Which points those are is a function of
the journal alone. A follower that starts anew reads it up to where the last one came, and
goes on with the very batches that the last one would have made.
"""

from __future__ import annotations

from pathlib import Path

from stoker.run import journal, view
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor, Event
from stoker.tracking.sink import Batch, Ending, Point

BATCH_EVENTS = 500


class Feed:
    """Reads a journal from `cursor` on; `cursor` moves with every batch taken."""

    def __init__(self, folder: Path, cursor: Cursor) -> None:
        self._folder = folder
        self.cursor = Cursor()
        self._points: dict[str, set[int]] = {}
        self._tables: set[tuple[str, int]] = set()
        self._ending: Ending | None = None
        self._last_event = 0.0
        for event in journal.read(folder, self.cursor, until=cursor):
            self._add(event, Batch())
        self.cursor = Cursor(dict(cursor.offsets))

    def take(self) -> Batch:
        """The next batch; empty where the journal holds nothing new."""
        batch = Batch()
        for event in journal.read(self._folder, self.cursor, limit=BATCH_EVENTS):
            self._add(event, batch)
        return batch

    def ending(self) -> Ending:
        """How the run ended, once its process is gone: killed, where it did not say."""
        return self._ending or Ending(view.KILLED, self._last_event)

    def _add(self, event: Event, batch: Batch) -> None:
        kind = event["type"]
        self._last_event = event["time"]
        if kind == "metrics":
            self._add_points(event, batch)
        elif kind == "table":
            key = (event["name"], event["step"])
            if key not in self._tables:
                self._tables.add(key)
                batch.tables.append(event)
        elif kind == "artifact":
            batch.artifacts[event["name"]] = event
        elif kind == "tags":
            batch.tags.update(event["tags"])
        elif kind == "attempt_started":
            self._ending = None
            batch.attempt_started = True
            batch.tags.update(_drift(event))
        elif kind == "attempt_ended":
            self._ending = Ending(event["status"], event["time"])

    def _add_points(self, event: Event, batch: Batch) -> None:
        step = event["step"]
        for metric, value in journal.decode_values(event["values"]).items():
            steps = self._points.setdefault(metric, set())
            if step not in steps:
                steps.add(step)
                batch.points.append(Point(metric, step, value, event["time"]))


def position(cursor: Cursor) -> int:
    """How many bytes of a journal lie before a cursor; it is read in one order, so this says where."""
    return sum(cursor.offsets.values())


def end(folder: Path) -> int:
    """The position behind everything that a journal holds now."""
    cursor = Cursor()
    for _ in journal.read(folder, cursor):
        pass
    return position(cursor)


def started(directory: RunDirectory) -> float:
    """When a run's first attempt began, in seconds since 1970; when it was made, where none did."""
    for event in journal.read(directory.journal, limit=1):
        return float(event["time"])
    return directory.record_file.stat().st_mtime


def _drift(event: Event) -> dict[str, str]:
    """What an attempt's config changed, as tags: a sink's params are written once."""
    drift = event.get("drift") or {}
    return {f"stoker.drift.{key}": f"{old} -> {new}" for key, (old, new) in drift.items()}
