"""Small periodic tasks in a background thread beside the training loop; pauses between tries that fail."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger("stoker")


def backoff(failures: int, first: float, longest: float) -> float:
    """Seconds before another try after so many failures: `first` without one, twice as long with each."""
    return min(first * 2.0 ** min(failures, 1000), longest)  # a float ends at 2**1024


@dataclass(frozen=True)
class Task:
    """Something to do every `seconds` seconds. Its first exception is logged, and it keeps being called."""

    seconds: float
    do: Callable[[], None]


class Periodic:
    """Does tasks in a daemon thread until `close`.

    The thread is kept for later tasks with the same name, so that a process with many short trials does not
    start one for each.

    Args:
        name: name of the thread; tasks of one thread run one after another.
    """

    def __init__(self, tasks: Sequence[Task], name: str = "stoker-periodic") -> None:
        now = time.monotonic()
        self._tasks = {_Due(task, now + task.seconds) for task in tasks}
        self._thread = _THREADS.setdefault(name, _Thread(name))
        self._thread.take(self._tasks)

    def close(self) -> None:
        """Wait for the current task to end, and start no other."""
        if self._thread in _THREADS.values():  # a forked process does not have the thread
            self._thread.drop(self._tasks)


@dataclass(eq=False)
class _Due:
    task: Task
    due: float
    failed: bool = False

    def do(self) -> None:
        try:
            self.task.do()
        except Exception as error:
            if not self.failed:
                self.failed = True
                log.warning("%s: %s", type(error).__name__, error)
        self.due = time.monotonic() + self.task.seconds


class _Thread:
    """Runs tasks when they are due, one after another; started with the first task."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[_Due] = set()
        self._doing: _Due | None = None
        self._looks_at = 0.0
        """When it wakes up by itself."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, tasks: set[_Due]) -> None:
        with self._changed:
            self._tasks |= tasks
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            elif min(task.due for task in tasks) < self._looks_at:
                self._changed.notify_all()

    def drop(self, tasks: set[_Due]) -> None:
        with self._changed:
            self._tasks -= tasks
            while self._doing in tasks and self._thread is not threading.current_thread():
                self._changed.wait()

    def _work(self) -> None:
        with self._changed:
            while True:
                task = min(self._tasks, key=lambda one: one.due, default=None)
                self._looks_at = task.due if task is not None else math.inf
                if task is not None and task.due <= time.monotonic():
                    self._do(task)
                else:
                    self._changed.wait(None if task is None else self._looks_at - time.monotonic())

    def _do(self, task: _Due) -> None:
        self._doing = task
        self._changed.release()
        try:
            task.do()
        finally:
            self._changed.acquire()
            self._doing = None
            self._changed.notify_all()


_THREADS: dict[str, _Thread] = {}
os.register_at_fork(after_in_child=_THREADS.clear)  # threads do not survive a fork
