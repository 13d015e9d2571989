"""The progress of a training loop on standard error: a bar on a terminal, plain lines elsewhere.

It reads what the run has already written, in a separate thread, so it neither waits for the device nor slows
a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from stoker import terminal

_LINE_EVERY = 10.0  # seconds between plain lines
_REFRESH_EVERY = 0.25


@dataclass(frozen=True)
class Reading:
    """The progress of a loop."""

    step: int
    total: int
    loss: float | None
    rate: float | None
    """Tokens or samples per second."""
    unit: str
    seconds_left: float | None

    def texts(self) -> list[str]:
        """`loss 3.2140`, `10.9k tok/s`, `1:02 left`, those that are known."""
        texts = [f"loss {self.loss:.4f}"] if self.loss is not None else []
        if self.rate is not None:
            texts.append(f"{short(self.rate)} {self.unit}/s")
        if self.seconds_left is not None:
            texts.append(f"{clock(self.seconds_left)} left")
        return texts


class ProgressDisplay:
    """A context manager that shows readings; `read` is called from another thread."""

    def __init__(self, title: str, read: Callable[[], Reading]) -> None:
        self._title = title
        self._read = read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _show(self) -> None:
        console = Console(stderr=True)
        if console.is_terminal:
            self._show_bar(console)
        else:
            self._show_lines()

    def _show_bar(self, console: Console) -> None:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as bar:
            task = bar.add_task(self._title, total=None, said="")
            over = False
            while not over:
                over = self._over.wait(_REFRESH_EVERY)
                now = self._read()
                bar.update(task, completed=now.step, total=now.total, said="  ".join(now.texts()))

    def _show_lines(self) -> None:
        shown = -1
        over = False
        while not over:
            over = self._over.wait(_LINE_EVERY if shown >= 0 else 1.0)
            now = self._read()
            if now.step != shown:
                shown = now.step
                terminal.say("  ".join([f"{self._title}  step {now.step}/{now.total}", *now.texts()]) + "\n")


def short(number: float) -> str:
    """`950`, `10.9k`, `1.2M`."""
    for limit, divisor, suffix in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if number < limit:
            return f"{number / divisor:.0f}" if not suffix else f"{number / divisor:.1f}{suffix}"
    return f"{number / 1e9:.1f}G"


def clock(seconds: float) -> str:
    """`0:42`, `12:03`, `1:04:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
