"""The output of a job as lines: from growing logs, local or in a store, and from several sources at once."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import object_store
from stoker.launch import jobs
from stoker.launch.jobs import Job
from stoker.launch.targets import Line
from stoker.object_store import Store, Unreachable
from stoker.run import stretches
from stoker.run.stretches import Stretch

log = logging.getLogger("stoker")

_EVERY = 0.5  # seconds
ASKED = 2.0  # seconds between two requests to a cluster, which serves others too


def lines(
    logs: Callable[[], Mapping[str, Path | StoredLog]], over: Callable[[], bool] | None = None
) -> Iterator[Line]:
    """The lines of logs, each with the name of its log.

    Args:
        logs: returns those that exist now, by name; others can appear.
        over: whether they have stopped growing; None to read only what they have now.
    """
    read: dict[str, _Reader] = {}
    asked, ended = time.monotonic(), over is None
    while True:
        for name, written in logs().items():
            for text in read.setdefault(name, _Reader()).more(written, whole=ended):
                yield Line(name, text)
        if ended:
            return
        if over is not None and time.monotonic() - asked >= ASKED:
            asked, ended = time.monotonic(), over()
        else:
            time.sleep(_EVERY)


class Logs:
    """A job's logs by writer: the local ones, and those of other machines in an object store.

    Args:
        nodes: whether to include those of its nodes, which some targets keep elsewhere.
    """

    def __init__(self, job: Job, *, nodes: bool) -> None:
        self._job, self._nodes = job, nodes
        self._store = object_store.of(job.runs)
        self._stored: dict[Path, StoredLog] = {}
        self._asked = -math.inf
        self._silent = False
        self._changed = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the store last had anything new, or did not answer."""
        return time.monotonic() - self._changed

    def __call__(self) -> dict[str, Path | StoredLog]:
        here: dict[Path, Path | StoredLog] = {
            file: file for run in self._job.trains for file in (self._job.runs / run).glob("logs/rank-*.log")
        }
        if self._nodes:
            here |= {file: file for file in self._job.folder.glob("*.log") if file.is_file()}
        there = {file: stored for file, stored in self.stored().items() if file.suffix == ".log"}
        found = {**there, **here}
        for file, stored in there.items():  # for a rank, the local file can be an old copy
            if file.parent != self._job.folder and file in here and stored.size > file.stat().st_size:
                found[file] = stored
        return {file.stem.replace("-", " "): found[file] for file in sorted(found, key=_order)}

    def stored(self) -> dict[Path, StoredLog]:
        """What the store has, by the file that it belongs to; requested only now and then."""
        if self._store is not None and time.monotonic() - self._asked >= ASKED:
            try:
                found = self._listed(self._store)
                if found != self._stored:
                    self._stored, self._changed = found, time.monotonic()
                self._silent = False
            except Unreachable as error:
                if not self._silent:
                    log.warning("%s; the output of other machines is not shown at the moment", error)
                self._silent, self._changed = True, time.monotonic()
            self._asked = time.monotonic()
        return self._stored

    def until(self, over: Callable[[], bool]) -> Callable[[], bool]:
        """Whether the job is over; the store is then asked once more."""

        def is_over() -> bool:
            if not over():
                return False
            self._asked = -math.inf
            return True

        return is_over

    def text(self, name: str) -> str:
        """The contents of a file that the job's nodes write, here or in the store."""
        file = self._job.folder / name
        return (_read(file, 0) or _read(self.stored().get(file, file), 0)).decode(errors="replace")

    def _listed(self, store: Store) -> dict[Path, StoredLog]:
        job, found = self._job, {}
        for run in job.trains:
            for key, stored in store.objects(f"{run}/logs").items():
                if Path(key).stem.startswith("rank-"):
                    found[job.runs / key] = StoredLog(store, key, stored.size)
        return found | (of_nodes(job, store) if self._nodes else {})


def of_nodes(job: Job, store: Store) -> dict[Path, StoredLog]:
    """What a store has of the output of a job's nodes, by file. Raises Unreachable."""
    base = f"{jobs.FOLDER}/{job.id}/{jobs.LOGS}"
    return {
        job.folder / name: StoredLog(store, f"{base}/{name}", of_file[-1].end, tuple(of_file))
        for name, of_file in stretches.known(base, store.objects(base)).items()
    }


def _order(file: Path) -> list[Any]:
    """Nodes before ranks, each in numerical order."""
    name, _, number = file.stem.partition("-")
    return [name == "rank", name, int(number) if number.isdecimal() else -1, file]


def together(
    *sources: Iterator[Line], more: Callable[[], Sequence[Iterator[Line]] | None] | None = None
) -> Iterator[Line]:
    """The lines of several sources as they come, until all have ended; each is read in its own thread.

    An error in one of them is raised here.

    Args:
        more: returns further sources, None once there will be no more; called every `ASKED` seconds.
    """
    read: queue.SimpleQueue[Line | Exception | None] = queue.SimpleQueue()

    def drain(source: Iterator[Line]) -> None:
        try:
            for line in source:
                read.put(line)
            read.put(None)
        except Exception as error:
            read.put(error)

    def begin(sources: Sequence[Iterator[Line]]) -> int:
        for source in sources:
            threading.Thread(target=drain, args=(source,), name="tail", daemon=True).start()
        return len(sources)

    left, asked = begin(sources), -math.inf
    while left or more is not None:
        if more is not None and time.monotonic() - asked >= ASKED:
            further, asked = more(), time.monotonic()
            left += begin(further or ())
            more = more if further is not None else None
            continue
        try:
            found = read.get(timeout=None if more is None else _EVERY)
        except queue.Empty:
            continue
        if isinstance(found, Exception):
            raise found
        if found is None:
            left -= 1
        else:
            yield found


@dataclass(frozen=True)
class StoredLog:
    """A log in an object store."""

    store: Store
    key: str
    size: int
    """Bytes."""
    stretches: tuple[Stretch, ...] = ()
    """If it is uploaded in stretches; otherwise it is one object."""

    def read(self, first: int) -> bytes:
        """Its contents from a byte on. Raises FileNotFoundError if the store has been written to since."""
        if first >= self.size:
            return b""
        if not self.stretches:
            return self.store.read(self.key, first, self.size)
        folder, _, name = self.key.rpartition("/")
        return b"".join(stretches.read(self.store, folder, name, self.stretches, first))


def _read(written: Path | StoredLog, first: int) -> bytes:
    """A log's contents from a byte on; empty if they cannot be read now."""
    try:
        if isinstance(written, StoredLog):
            return written.read(first)
        with written.open("rb") as file:
            file.seek(first)
            return file.read()
    except (FileNotFoundError, Unreachable):
        return b""


class _Reader:
    """Reads a log as it grows."""

    def __init__(self) -> None:
        self._at = 0
        self._begun = b""
        """The incomplete last line."""

    def more(self, written: Path | StoredLog, *, whole: bool) -> list[str]:
        """The new lines; with `whole`, including an incomplete last one."""
        content = _read(written, self._at)
        self._at += len(content)
        *lines, self._begun = (self._begun + content).split(b"\n")
        if whole and self._begun:
            lines.append(self._begun)
            self._begun = b""
        return [line.decode(errors="replace") for line in lines]
