"""The ledger: the progress of a sink, in a small file that survives any kill.

It is replaced atomically after every batch that the sink has stored. If it is lost or unreadable, the
follower starts from the beginning, which only costs time, since sinks are idempotent.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import redaction, storage
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor


@dataclass
class Ledger:
    """What a follower knows about its sink."""

    run: str | None = None
    """The run's id in the sink."""
    where: str = ""
    offsets: dict[str, int] = field(default_factory=dict)
    """The cursor: the number of bytes shipped of each journal file."""
    mark: Any = None
    """The value that the sink returned for the last batch, see `Sink`."""
    concluded: bool = False
    """Whether the sink was told how the run ended, after everything else was shipped."""
    error: str | None = None
    since: float | None = None
    """When the sink started to fail, in seconds since 1970."""
    pid: int = 0
    """The process id of the follower that wrote the ledger."""
    edition: str = ""
    """Identifies the sink's run if it was rebuilt; each `stoker sync --rebuild` sets another value."""
    folded: dict[str, int] = field(default_factory=dict)
    """The cursor at the last rebuild; points that were superseded by then are skipped, see `Feed`."""

    def begun(self, run: str | None) -> Ledger:
        """The ledger for a run in the sink to which nothing of the journal was shipped yet."""
        return Ledger(run=run, edition=self.edition, folded=self.folded)

    @property
    def cursor(self) -> Cursor:
        return Cursor(dict(self.offsets))

    def failed(self, reason: str) -> None:
        """Record why the sink fails, in one line, and since when."""
        self.error = textwrap.shorten(reason, 500, placeholder=" ...")
        self.since = self.since or time.time()

    def recovered(self) -> None:
        self.error = self.since = None

    def save(self, file: Path) -> None:
        """Write the ledger, redacting secrets that an error may quote. Raises OSError."""
        self.pid = os.getpid()
        file.parent.mkdir(exist_ok=True)
        storage.write_atomically(file, orjson.dumps(redaction.tree(asdict(self)), option=orjson.OPT_INDENT_2))


def load(file: Path) -> Ledger:
    """Read a ledger; returns a new one if the file is missing or unreadable."""
    with contextlib.suppress(OSError, orjson.JSONDecodeError, TypeError):
        return Ledger(**orjson.loads(file.read_bytes()))
    return Ledger()


def file_of(directory: RunDirectory, sink: str) -> Path:
    return directory.sinks / f"{sink}.json"


def lock_of(directory: RunDirectory, sink: str) -> Path:
    """Locked by the follower that ships this run to this sink."""
    return directory.sinks / f"{sink}.lock"
