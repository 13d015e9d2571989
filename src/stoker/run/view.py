"""The view of a run: the fold over its journal.

The journal is append-only, and the current state of a run is computed from it. When an attempt resumes from
step k, every point after k becomes void, so the view has exactly one point per metric and step: no gap and no
duplicate, whenever a process was killed. If a point was logged twice without a resume in between (a step that
was finished, then finished again after the last checkpoint), the first one stands, as it does in every sink.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stoker.run import compact, journal
from stoker.run.directory import RunDirectory
from stoker.run.journal import Block, Damage, Event
from stoker.run.reduction import Reduction
from stoker.run.series import Columns
from stoker.run.state import AttemptView, LeftOut, Media, RunView, Use
from stoker.status import FAILED, KILLED, STOPPED


def load(directory: RunDirectory) -> RunView:
    """Fold the journal of a run, or read the stored result of an earlier fold.

    Raises BadInput if its record cannot be read.
    """
    record = directory.record()
    alive = directory.alive  # before reading: if no process is training now, the journal no longer changes
    sizes = journal.sizes(directory.journal)
    known = compact.load(directory, sizes)
    if known is not None:
        return known(record)
    view = fold(directory, record)
    if not alive:
        compact.save(view, sizes)
    return view


def fold(directory: RunDirectory, record: dict[str, Any]) -> RunView:
    """Fold the whole journal of a run."""
    folding = _Folding(RunView(directory, record))
    with _without_garbage_collection():
        for block in journal.read_blocks(directory.journal):
            folding.add(block)
    return folding.finish()


class _Folding:
    """A fold in progress."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._points: dict[str, Columns] = {}
        self._system: dict[str, Columns] = {}
        self._samples = 0
        self._tagged: dict[str, float] = {}
        self._reduction = Reduction(1)

    def add(self, block: Block) -> None:
        """Fold the events of one block; events that lack a field of their type are recorded as damage."""
        self._view.damage += block.damage
        if block.attempt != journal.FROM_OUTSIDE and block.events:
            self._begin(block.attempt, block.events[0]["time"])
        for line, event in zip(block.lines, block.events, strict=True):
            try:
                if event["type"] == "metrics":
                    self._metrics(event, block.rank)
                else:
                    self._other(event, block)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                self._view.damage.append(Damage(block.file, line, f"incomplete event: {error!r}"))
        if block.attempt != journal.FROM_OUTSIDE and block.rank == 0 and block.events:
            self._view.attempts[-1].last_event = float(block.events[-1]["time"])

    def finish(self) -> RunView:
        view = self._view
        view.points = {metric: columns.series() for metric, columns in self._points.items()}
        view.points = {metric: series for metric, series in view.points.items() if len(series)}
        view.system = {metric: columns.series() for metric, columns in self._system.items()}
        view.notes.sort()
        view.damage.sort(key=lambda damage: (damage.file, damage.line))
        return view

    def _begin(self, number: int, time: float) -> None:
        attempts = self._view.attempts
        if not attempts or attempts[-1].number != number:
            attempts.append(AttemptView(number, time))  # its first line may be damaged
            self._reduction = Reduction(1)

    def _metrics(self, event: Event, rank: int) -> None:
        step, time, values = event["step"], event["time"], event["values"]
        if type(step) is not int:
            raise TypeError("a step must be a whole number")
        if "reduce" in event:
            values = self._reduction.add(event["reduce"], step, journal.decode_values(values), rank)
        elif rank != 0:
            return
        for metric, value in values.items():
            number = value if type(value) is float else journal.decode(value)
            try:
                columns = self._points[metric]
            except KeyError:
                columns = self._points[metric] = Columns()
            columns.append(step, number, time)

    def _other(self, event: Event, block: Block) -> None:
        kind, view = event["type"], self._view
        if kind in _FOLDED_ALONE:
            _FOLDED_ALONE[kind](view, event)
        elif kind == "attempt_started":
            view.attempts[-1] = AttemptView(
                block.attempt, event["time"], event["host"], event["pid"], event.get("world", 1),
                machines=event.get("machines", 1), drift=event.get("drift", {}), code=event.get("code", {}),
            )  # fmt: skip
            self._reduction = Reduction(view.attempts[-1].world)
        elif kind == "resumed":
            self._void_after(event["step"])
            view.trained = event["step"]
            view.attempts[-1].resumed_from = event["step"] or None
            view.attempts[-1].passed_over = event.get("passed_over", [])
        elif kind == "system":
            for metric, value in journal.decode_values(event["values"]).items():
                self._system.setdefault(metric, Columns()).append(self._samples, value, event["time"])
            self._samples += 1
        elif kind == "tags":
            self._tags(event, from_outside=block.attempt == journal.FROM_OUTSIDE)

    def _tags(self, event: Event, *, from_outside: bool) -> None:
        """Set tags: the latest value wins, whoever wrote it, and None removes the tag.

        Attempts count in their order, whatever their clocks say; tags set from outside count by their time.
        """
        for key, value in event["tags"].items():
            if not from_outside or event["time"] >= self._tagged.get(key, 0.0):
                self._tagged[key] = event["time"]
                self._view.tags.pop(key, None)
                if value is not None:
                    self._view.tags[key] = value

    def _void_after(self, step: int) -> None:
        for columns in self._points.values():
            columns.void_after(step)
        self._view.media = [m for m in self._view.media if m.step <= step]
        self._view.left_out = [batch for batch in self._view.left_out if batch.step <= step]
        self._view.checkpoints = [s for s in self._view.checkpoints if s <= step]


def _plan(view: RunView, event: Event) -> None:
    view.total_steps = event["total_steps"]
    view.samples_per_step = event.get("samples_per_step")
    view.tokens_per_step = event.get("tokens_per_step")
    view.samples_per_epoch = event.get("samples_per_epoch")
    view.best = event.get("best", view.best)
    view.attempts[-1].began = event["time"]


def _begun_from(view: RunView, event: Event) -> None:
    view.attempts[-1].resumed_from = event["step"] or None


def _layout(view: RunView, event: Event) -> None:
    view.attempts[-1].layout = _fields(event)


def _data(view: RunView, event: Event) -> None:
    view.attempts[-1].data = _fields(event)


def _fields(event: Event) -> dict[str, Any]:
    return {k: v for k, v in event.items() if k not in ("type", "time", "seq")}


def _peak(view: RunView, event: Event) -> None:
    view.attempts[-1].layout["peak"] = {"flops": float(event["flops"]), "source": str(event["source"])}


def _spent(view: RunView, event: Event) -> None:
    seconds = {what: float(event["seconds"][what]) for what in ("waiting", "evaluating", "checkpointing")}
    about = {"time": float(event["time"]), "step": int(event["step"]), "over": bool(event["over"])}
    view.attempts[-1].spent.append({**about, "seconds": seconds})


def _media(view: RunView, event: Event) -> None:
    found = Media(event["kind"], event["name"], event["step"], event.get("file"), event.get("about", {}))
    if not any((m.kind, m.name, m.step) == (found.kind, found.name, found.step) for m in view.media):
        view.media.append(found)


def _skipped(view: RunView, event: Event) -> None:
    found = LeftOut(event["step"], event["samples"], event["reason"], event["time"])
    if all(batch.step != found.step for batch in view.left_out):
        view.left_out.append(found)


def _rewound(view: RunView, event: Event) -> None:
    for batch in view.left_out:
        if batch.step == event["step"]:
            batch.rewound_to = event["to"]


def _ended(view: RunView, event: Event) -> None:
    last = view.attempts[-1]
    last.ended, last.status, last.error = event["time"], event["status"], event.get("error")
    last.step = event.get("step")
    view.trained = view.trained if last.step is None else last.step


def _failed(view: RunView, event: Event) -> None:
    """Set the error of an attempt to the one its launcher recorded, which knows more than rank 0."""
    for attempt in view.attempts:
        if attempt.number == event["of"]:
            attempt.error = event["error"]
            if event.get("raised") and attempt.ended is None:  # what it says itself, it may say later
                attempt.status = FAILED
            if event.get("status") and attempt.status in (FAILED, KILLED):
                attempt.status = event["status"]


def _given_up(view: RunView, event: Event) -> None:
    """Set the status of an attempt that a search will not continue; a later attempt is not affected."""
    for attempt in view.attempts:
        if attempt.number == event["of"]:
            attempt.status = STOPPED


_FOLDED_ALONE: dict[str, Callable[[RunView, Event], Any]] = {
    "plan": _plan,
    "begun_from": _begun_from,
    "layout": _layout,
    "data": _data,
    "peak": _peak,
    "spent": _spent,
    "media": _media,
    "skipped": _skipped,
    "rewound": _rewound,
    "attempt_ended": _ended,
    "attempt_failed": _failed,
    "given_up": _given_up,
    "checkpoint": lambda view, event: view.checkpoints.append(event["step"]),
    "artifact": lambda view, event: view.artifacts.update({event["name"]: event}),
    "used": lambda view, e: view.used.update({e["name"]: Use(e["name"], e.get("run"), e["files"])}),
    "used_by": lambda view, event: view.used_by.append({"name": event["name"], "run": event["run"]}),
    "params": lambda view, event: view.params.update(event["values"]),
    "goals": lambda view, event: view.goals.update(event["goals"]),
    "note": lambda view, event: view.notes.append((event["time"], event["text"])),
}


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: folding creates millions of objects, none of them in garbage cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
