"""The follower: a process of its own that ships a run's journal to a sink.

    python -m stoker.tracking.follower RUN_DIRECTORY

It reads behind a cursor that it keeps on disk, and moves the cursor once the sink has what
was read; after a crash it reads the same again, and the sink keeps one of each. A point
that an attempt logs again is not shipped again: the first one stands. Nobody waits for it: a
sink that is slow or down is tried again, ever more rarely. It ends when the process that
trains is gone, however that went, and everything is shipped.

Nothing here imports a sink's library but `main`, which runs in the follower's own process.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.run import journal, view
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor, Event
from stoker.tracking.sink import Point, Sink

_POLL = 0.5  # seconds
_BATCH = 1000  # events read at once
_LONGEST_PAUSE = 30.0  # seconds between tries of a sink that fails
_PATIENCE = 60.0  # seconds that a failing sink is tried for once training is over


@dataclass(frozen=True)
class SinkState:
    """How far a sink is."""

    name: str
    where: str
    pending: int
    """Events of the journal that it does not have yet."""
    error: str | None


def enabled() -> tuple[str, ...]:
    """The sinks in use: what STOKER_SINKS says, `none` for none; MLflow by default."""
    names = os.environ.get("STOKER_SINKS", "mlflow")
    return () if names in ("", "none") else tuple(name.strip() for name in names.split(","))


def spawn(directory: RunDirectory) -> subprocess.Popen[bytes] | None:
    """Start the follower of a run, apart from this process's terminal; None where no sink is in use."""
    if not enabled():
        return None
    log = os.open(
        directory.logs / "follower.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
    )
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "stoker.tracking.follower", str(directory.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)


def state(directory: RunDirectory) -> list[SinkState]:
    """How far each sink of a run is, as its follower last said."""
    return [_state(directory, file) for file in sorted(directory.sinks.glob("*.json"))]


def wait(directory: RunDirectory, process: subprocess.Popen[bytes], timeout: float) -> list[SinkState]:
    """Wait until a follower ends, reports a failing sink, or the timeout (seconds) is over."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        if any(s.error for s in state(directory)):
            break
        time.sleep(0.05)
    return state(directory)


class Follower:
    """Ships one run to one sink."""

    def __init__(self, directory: RunDirectory, name: str, sink: Sink) -> None:
        self._directory = directory
        self._sink = sink
        self._file = directory.sinks / f"{name}.json"
        saved = _read(self._file)
        self._cursor = Cursor(dict(saved.get("offsets", {})))
        self._known: dict[str, Any] = saved.get("known", {})
        self._status: str | None = saved.get("status")  # what the sink was told
        self._error: str | None = None
        self._opened = False
        self._shipped: dict[str, set[int]] = {}
        self._said: str | None = None
        for event in journal.read(directory.journal, until=self._cursor):
            self._remember(self._new_points(event))
            self._said = _said(event, self._said)

    def follow(self) -> None:
        """Ship until training is over and everything is shipped, or the sink failed for too long after."""
        pause, over_since = _POLL, None
        while True:
            alive = self._directory.alive  # asked first: what is written before it dies is read after
            moved = self.ship(alive)
            if not alive and over_since is None:
                over_since = time.monotonic()
            if self._error is None:
                pause = _POLL
                if not alive and not moved:
                    return
            else:
                pause = min(pause * 2, _LONGEST_PAUSE)
                if over_since is not None and time.monotonic() - over_since > _PATIENCE:
                    return
            if not moved:
                time.sleep(pause)

    def ship(self, alive: bool) -> bool:
        """Ship what is new, up to a batch; returns whether the cursor moved. A failure goes into the file."""
        ahead = Cursor(dict(self._cursor.offsets))
        events = list(journal.read(self._directory.journal, ahead, limit=_BATCH))
        said = functools.reduce(lambda before, event: _said(event, before), events, self._said)
        status = said or (view.RUNNING if alive else view.KILLED)
        if not events and status == self._status and self._error is None:
            return False
        try:
            self._open()
            points = self._send(events)
            if status != self._status:
                self._sink.set_status(status)
        except Exception as error:  # whatever a sink does, training must not know
            self._fail(error)
            return False
        self._remember(points)
        moved = bool(events)
        self._cursor, self._said, self._status, self._error = ahead, said, status, None
        self._save()
        return moved

    def _open(self) -> None:
        if not self._opened:
            self._known = self._sink.open(self._known)
            self._opened = True
            self._save()

    def _send(self, events: list[Event]) -> list[Point]:
        points: list[Point] = []
        fresh: set[tuple[str, int]] = set()
        for event in events:
            for point in self._new_points(event):
                if (point.metric, point.step) not in fresh:
                    fresh.add((point.metric, point.step))
                    points.append(point)
        if points:
            self._sink.send(points)
        for event in events:
            if event["type"] in ("tags", "artifact", "table"):
                self._sink.record(event)
        return points

    def _new_points(self, event: Event) -> list[Point]:
        if event["type"] != "metrics":
            return []
        step = event["step"]
        return [
            Point(metric, value, event["time"], step)
            for metric, value in journal.decode_values(event["values"]).items()
            if step not in self._shipped.get(metric, ())
        ]

    def _remember(self, points: list[Point]) -> None:
        for point in points:
            self._shipped.setdefault(point.metric, set()).add(point.step)

    def _fail(self, error: Exception) -> None:
        self._opened = False  # a server that came back may have forgotten the run
        self._error = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stderr.write(f"{time.strftime('%F %T')} {self._error}\n")
        self._save()

    def _save(self) -> None:
        content = {
            "offsets": self._cursor.offsets,
            "known": self._known,
            "status": self._status,
            "error": self._error,
        }
        storage.write_atomically(self._file, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def _said(event: Event, before: str | None) -> str | None:
    """How the newest attempt ended, if it has said so by this event."""
    if event["type"] == "attempt_started":
        return None
    return str(event["status"]) if event["type"] == "attempt_ended" else before


def _state(directory: RunDirectory, file: Path) -> SinkState:
    saved = _read(file)
    cursor = Cursor(dict(saved.get("offsets", {})))
    pending = sum(1 for _ in journal.read(directory.journal, cursor))
    return SinkState(file.stem, saved.get("known", {}).get("where", ""), pending, saved.get("error"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    return content if isinstance(content, dict) else {}


def main(path: str) -> None:
    """Follow a run to its end; a second follower of it waits for the first."""
    from stoker.tracking.mlflow_sink import MLflowSink

    os.nice(5)
    directory = RunDirectory(Path(path))
    with storage.locked(directory.sinks / "follower.lock"):
        Follower(directory, "mlflow", MLflowSink(directory)).follow()


if __name__ == "__main__":
    main(sys.argv[1])
