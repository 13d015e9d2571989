"""What a job writes, as lines: of files that grow, and of several sources at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from stoker.launch.jobs import Job
from stoker.launch.targets import Line

_EVERY = 0.5  # seconds
_ASKED = 2.0  # seconds between two questions of a cluster, which serves others too


def lines(files: Callable[[], Mapping[str, Path]], over: Callable[[], bool] | None = None) -> Iterator[Line]:
    """What files have, line by line, each with the name of its file.

    Args:
        files: those that are there now, by name; others may come.
        over: whether they grow no more; None for what they have now.
    """
    read: dict[Path, _Reader] = {}
    asked, ended = time.monotonic(), over is None
    while True:
        for name, file in files().items():
            for text in read.setdefault(file, _Reader(file)).more(whole=ended):
                yield Line(name, text)
        if ended:
            return
        if over is not None and time.monotonic() - asked >= _ASKED:
            asked, ended = time.monotonic(), over()
        else:
            time.sleep(_EVERY)


def of_ranks(job: Job) -> dict[str, Path]:
    """The logs of the ranks of a job's runs, as far as they stand in its runs folder."""
    found = {
        int(file.stem.removeprefix("rank-")): file
        for run in job.trains
        for file in (job.runs / run).glob("logs/rank-*.log")
    }
    return {f"rank {rank}": found[rank] for rank in sorted(found)}


def together(*sources: Iterator[Line]) -> Iterator[Line]:
    """The lines of several sources as they come, until all have ended; each is read in a thread of its own.

    What one of them raises is raised here.
    """
    read: queue.SimpleQueue[Line | Exception | None] = queue.SimpleQueue()

    def drain(source: Iterator[Line]) -> None:
        try:
            for line in source:
                read.put(line)
            read.put(None)
        except Exception as error:
            read.put(error)

    for source in sources:
        threading.Thread(target=drain, args=(source,), name="tail", daemon=True).start()
    left = len(sources)
    while left:
        found = read.get()
        if isinstance(found, Exception):
            raise found
        if found is None:
            left -= 1
        else:
            yield found


class _Reader:
    """A file that is read as it grows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._at = 0
        self._begun = b""
        """The line of which the end is not there yet."""

    def more(self, *, whole: bool) -> list[str]:
        """The lines that have come; with `whole` also one that has no end."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._at)
                content = file.read()
        except FileNotFoundError:
            content = b""
        self._at += len(content)
        *lines, self._begun = (self._begun + content).split(b"\n")
        if whole and self._begun:
            lines.append(self._begun)
            self._begun = b""
        return [line.decode(errors="replace") for line in lines]
