"""A trial as its own process sees it: its values go to the controller, whose decision comes back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stoker.attempt import Run
from stoker.errors import EXIT_FAILED, StokerError


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
    metric: str
    provenance: Path | None
    """What all trials of a search are made from; None of a run that gathers its own, and ships itself."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its run."""


class NotFinite(StokerError):
    """The value that is searched for is NaN or infinite."""


class Link:
    """What a process of a trial and the controller say to each other, as JSON objects."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, kind: str, **fields: Any) -> None:
        """Say something to which there is no answer."""
        self._connection.send_bytes(json.dumps({"kind": kind, **fields}).encode())

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Say something, and wait for the answer.

        Where the other end is gone, this process ends at once, as it is about to be: an error would go down
        in the run as its own failure.
        """
        try:
            self.tell(kind, **fields)
            return self.hear()
        except (EOFError, OSError):
            os._exit(EXIT_FAILED)

    def hear(self) -> dict[str, Any]:
        """What the other end says next. Raises EOFError where it is gone."""
        found: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return found


class Reporter:
    """Listens to a run: the values of one metric are reported, and what is decided then is done.

    A run that a Trainer steps stops at the end of the step, on all ranks; any other at once, within
    `run.log`.
    """

    def __init__(self, run: Run, metric: str, link: Link) -> None:
        self._run, self._metric, self._link = run, metric, link
        self.logged: set[str] = set()
        """The names of all metrics so far."""

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Called by the run with what was logged. Raises NotFinite, or Stopped."""
        self.logged.update(values)
        if self._metric not in values:
            return
        value = float(values[self._metric])
        if not math.isfinite(value):
            raise NotFinite(f"{self._metric} is {value} at step {step}")
        answer = self._link.ask("report", step=step, value=value, metrics={**self._run.latest})
        if answer["save"]:
            self._run.stop.ask_to_save()
        if answer["decision"] != "continue":
            self._run.stop.ask(answer["decision"])
