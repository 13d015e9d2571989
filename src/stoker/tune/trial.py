"""A trial in its own process: reports its values to the controller and carries out the decisions."""

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
from stoker.periodic import Periodic, Task
from stoker.supervision import Heart
from stoker.tune.plan import SHARE


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """Everything that the processes of a trial need to know."""

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
    """The metrics to optimise; each value of the first one is reported."""
    unit: str
    """The unit that schedulers count by, as in `Plan`."""
    provenance: Path | None
    """The provenance that a search's trials share; None if the run gathers its own and ships itself."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of its run."""
    waits: bool = True
    """Whether it waits for a decision after each report; otherwise its reports are not answered."""


@dataclass(frozen=True)
class Began:
    """The training of a trial that was handed over ahead has started."""

    number: int


@dataclass(frozen=True)
class Report:
    """A value of the first metric, after which a trial waits for a decision unless its job says otherwise."""

    number: int
    step: int
    value: float
    per_step: float = 1.0
    """How much of the unit that schedulers count by one step is."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest value of every metric that it logs."""


@dataclass(frozen=True)
class Ended:
    """The end of a trial."""

    number: int
    status: str
    """A run's status (finished, paused, stopped, preempted...), or killed (by a signal or a lost machine)."""
    error: str = ""
    trace: str = ""
    logged: tuple[str, ...] = ()
    """The names of the metrics that it has logged."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The newest value of each metric to optimise."""
    refused: bool = False
    """Whether its input was refused: it never started, and a retry would not help."""
    where: str = ""
    """The machine that refused it, if others may not; it is only shown."""

    @property
    def said(self) -> str:
        """The error, with the machine."""
        return f"{self.error} (on {self.where})" if self.where else self.error


_HELD = 0.25
"""Seconds between messages to a controller that does not answer them; each message wakes it."""
_SILENT = 1800.0  # seconds; an evaluation may take long without logging anything


class NotFinite(StokerError):
    """A metric to optimise is NaN or infinite."""


class Link:
    """The connection between a process of a trial and the controller. Each message is a dict.

    Each message wakes the other end, so reports that can wait are held and sent with the next message.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def hold(self, **report: Any) -> None:
        """Hold a report until the next message."""
        with self._lock:
            self._held.append(report)

    def send_held(self) -> None:
        """Send the held reports, if there are any."""
        if self._held:
            self.send("reports")

    def tell(self, kind: str, **fields: Any) -> None:
        """Send a message, with the held reports."""
        with self._lock:
            held, self._held = self._held, []
            self._connection.send_bytes(pickle.dumps({"kind": kind, "reports": held, **fields}))

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Send a message and wait for the answer.

        If the other end is gone, this process exits at once, as it is about to be killed anyway: an exception
        would be recorded as a failure of the run.
        """
        self.send(kind, **fields)
        try:
            return self.hear()
        except (EOFError, OSError):
            os._exit(EXIT_FAILED)

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message; if the other end is gone, exit as `ask` does."""
        try:
            self.tell(kind, **fields)
        except OSError:
            os._exit(EXIT_FAILED)

    def hear(self) -> dict[str, Any]:
        """Receive the next message. Raises EOFError if the other end is gone."""
        found: dict[str, Any] = self._connection.recv()
        return found


class Reporter:
    """Listens to a run, reports the values of the first metric and carries out the decisions about them.

    Args:
        waits: as in `TrialJob`.
        hang_limit: seconds without a logged value after which a loop without a Trainer counts as hanging; by
            default 20 times its longest pause so far, but at least half an hour.

    Values logged before a Trainer's loop starts say nothing about the trial and are not reported.

    With a Trainer, the run stops at the end of the step, on all ranks; without one, immediately, within
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
        self._sends = None if waits else Periodic([Task(_HELD, link.send_held)])
        self.logged: set[str] = set()
        """The names of all metrics logged so far."""
        self.values: dict[str, float] = {}
        """The newest value of each metric to optimise."""

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Called by the run with the logged values. Raises NotFinite or Stopped."""
        if self._attempt.heart is self._heart:  # a Trainer sets its own
            self._heart.beat(step)
        self.logged.update(values)
        for metric in self._metrics:
            if metric in values:
                value = float(values[metric])
                if not math.isfinite(value):
                    raise NotFinite(f"{metric} is {value} at step {step}")
                self.values[metric] = value
        if self._metrics[0] not in values or self._unit == SHARE:  # for a share, the last value counts
            return
        # A Trainer's loop has not started.
        if self._attempt.heart is not self._heart and not self._attempt.plan:
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
        """End the periodic sending; the held reports go with the message that the trial has ended."""
        if self._sends is not None:
            self._sends.close()

    def _per_step(self) -> float:
        """How much of the unit one step is. Raises StokerError if the loop does not report it."""
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
