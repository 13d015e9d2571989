"""A trial as its own process sees it: its values go to the controller, whose decision comes back."""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stoker import duration
from stoker.attempt import Attempt
from stoker.errors import EXIT_FAILED, StokerError
from stoker.periodic import Job as Timed
from stoker.periodic import Periodic
from stoker.supervision import Heart
from stoker.tune.plan import SHARE


@dataclass(frozen=True)
class Job:
    """All that the processes of a trial need to know."""

    number: int
    recipe: str
    """The recipe's reference."""
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    runs: Path
    sweep: str
    """The folder of its run, under `runs`."""
    run: str
    metrics: tuple[str, ...]
    """What is searched for; each value of the first one is reported."""
    unit: str
    """What schedulers count by, as a plan's."""
    provenance: Path | None
    """What all trials of a search are made from; None of a run that gathers its own, and ships itself."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its run."""
    waits: bool = True
    """Whether it waits at each report for what is decided; else nothing ever is, and it is not answered."""


@dataclass(frozen=True)
class Began:
    """A trial that was handed over ahead is trained now."""

    number: int


@dataclass(frozen=True)
class Report:
    """A value of the metric, for which a trial waits to be told what to do."""

    number: int
    step: int
    value: float
    per_step: float = 1.0
    """How much of the unit that schedulers count by one step is."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest value of everything that it logs."""


@dataclass(frozen=True)
class Ended:
    """A trial is over: how, as it said itself."""

    number: int
    status: str
    """As a run's (finished, paused, stopped, preempted, ...); killed, by a signal."""
    error: str = ""
    trace: str = ""
    logged: tuple[str, ...] = ()
    """The metrics that it has logged."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The newest value of each metric that is searched for."""
    refused: bool = False
    """Whether it failed of bad input: it has not begun, and would not if it were tried again."""


_HELD = 0.25
"""Seconds between messages to a controller that answers none: each of them wakes it."""
_SILENT = 1800.0  # seconds: an evaluation may take long, and need not say anything


class NotFinite(StokerError):
    """The value that is searched for is NaN or infinite."""


class Link:
    """What a process of a trial and the controller say to each other, each of them a dict.

    Each thing that is said wakes the other end: what may wait goes with what is said next.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def hold(self, **report: Any) -> None:
        """Say a report with what is said next."""
        with self._lock:
            self._held.append(report)

    def send_held(self) -> None:
        """Say the reports that are held, where there are any."""
        if self._held:
            self.send("reports")

    def tell(self, kind: str, **fields: Any) -> None:
        """Say something to which there is no answer."""
        with self._lock:
            held, self._held = self._held, []
            self._connection.send_bytes(pickle.dumps({"kind": kind, "reports": held, **fields}))

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Say something, and wait for the answer.

        Where the other end is gone, this process ends at once, as it is about to be: an error would go down
        in the run as its own failure.
        """
        self.send(kind, **fields)
        try:
            return self.hear()
        except (EOFError, OSError):
            os._exit(EXIT_FAILED)

    def send(self, kind: str, **fields: Any) -> None:
        """Say something to which there is no answer; as `ask` where the other end is gone."""
        try:
            self.tell(kind, **fields)
        except OSError:
            os._exit(EXIT_FAILED)

    def hear(self) -> dict[str, Any]:
        """What the other end says next. Raises EOFError where it is gone."""
        found: dict[str, Any] = self._connection.recv()
        return found


class Reporter:
    """Listens to a run: the values of the first metric are reported, and what is decided then is done.

    Args:
        waits: as a job's.
        hang_limit: seconds without a word after which a loop without a Trainer hangs; by default 20 times its
            longest silence so far, and half an hour at least.

    What is measured before a Trainer's first step says nothing of a trial, and is not reported.

    A run that a Trainer steps stops at the end of the step, on all ranks; any other at once, within
    `run.log`.
    """

    def __init__(
        self,
        attempt: Attempt,
        metrics: tuple[str, ...],
        unit: str,
        link: Link,
        *,
        waits: bool,
        hang_limit: float | None = None,
    ) -> None:
        self._heart = attempt.heart = Heart(hang_limit, at_least=_SILENT)
        self._heart.begin(attempt.step)
        self._attempt, self._metrics, self._unit, self._link, self._waits = (
            attempt,
            metrics,
            unit,
            link,
            waits,
        )
        self._sends = None if waits else Periodic([Timed(_HELD, link.send_held)])
        self.logged: set[str] = set()
        """The names of all metrics so far."""
        self.values: dict[str, float] = {}
        """The newest value of each that is searched for."""

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Called by the run with what was logged. Raises NotFinite, or Stopped."""
        if self._attempt.heart is self._heart:  # a Trainer brings its own
            self._heart.beat(step)
        self.logged.update(values)
        for metric in self._metrics:
            if metric in values:
                value = float(values[metric])
                if not math.isfinite(value):
                    raise NotFinite(f"{metric} is {value} at step {step}")
                self.values[metric] = value
        if self._metrics[0] not in values or self._unit == SHARE:  # of such a one the last value counts
            return
        if (
            self._attempt.heart is not self._heart and not self._attempt.plan
        ):  # a Trainer's loop has not begun
            return
        report = {"step": step, "value": self.values[self._metrics[0]], "per_step": self._per_step()}
        if not self._waits:
            self._link.hold(**report)
            return
        self._link.hold(**report, metrics={**self._attempt.recorder.latest})
        answer = self._link.ask("reports")
        if answer["save"]:
            self._attempt.stop.ask_to_save()
        if answer["decision"] != "continue":
            self._attempt.stop.ask(answer["decision"])

    def close(self) -> None:
        """The trial is over: what is held goes with the word that it is."""
        if self._sends is not None:
            self._sends.close()

    def _per_step(self) -> float:
        """How much of the unit one step is. Raises StokerError where the loop does not say."""
        plan = self._attempt.plan
        found = duration.of_a_step(
            self._unit, samples=plan.get("samples_per_step"), tokens=plan.get("tokens_per_step"),
            samples_per_epoch=plan.get("samples_per_epoch"),
        )  # fmt: skip
        if found is None:
            raise StokerError(
                f"trials are compared by {self._unit}s, and this loop does not report how many it does: "
                "train with a Trainer on data that counts them, or give --least, --most and --budget in steps"
            )
        return found
