"""Small jobs beside the training loop, each every so many seconds, in one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger("stoker")


@dataclass(frozen=True)
class Job:
    """Something to do every so many seconds. What it raises is logged once; it is tried again."""

    seconds: float
    do: Callable[[], None]


class Periodic:
    """Does jobs in a thread that ends with the process, or with `close`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._failed: set[Job] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="stoker-periodic", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the job under way end, and begin no other."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        due = {job: time.monotonic() + job.seconds for job in self._jobs}
        while not self._closed.wait(max(0.0, min(due.values()) - time.monotonic())):
            now = time.monotonic()
            for job in [job for job in self._jobs if due[job] <= now]:
                self._do(job)
                due[job] = time.monotonic() + job.seconds

    def _do(self, job: Job) -> None:
        try:
            job.do()
        except Exception as error:
            if job not in self._failed:
                self._failed.add(job)
                log.warning("%s: %s", type(error).__name__, error)
