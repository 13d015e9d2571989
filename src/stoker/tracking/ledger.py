"""The ledger: how far a sink has got, kept in a small file that survives any kill.

It is written whole after every batch that a sink has stored. Where it is lost or cannot be
read the follower begins anew, which costs time and nothing else, since sinks are idempotent.
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
    """What a follower knows of its sink."""

    run: str | None = None
    """The run's id in the sink."""
    where: str = ""
    offsets: dict[str, int] = field(default_factory=dict)
    """The cursor: bytes shipped of every journal file."""
    mark: Any = None
    """What the sink said of how far it was after the last batch."""
    concluded: bool = False
    """Whether the sink was told how the run ended, after everything else was shipped."""
    error: str | None = None
    since: float | None = None
    """Since when the sink has been failing, in seconds since 1970."""
    pid: int = 0
    """The follower that wrote this."""
    edition: str = ""
    """Which of the runs that the sink has of this one: another since each `stoker sync --rebuild`."""
    folded: dict[str, int] = field(default_factory=dict)
    """The cursor up to which that run is the fold: what was void by then is left out."""

    def begun(self, run: str | None) -> Ledger:
        """The ledger of a run in the sink that has nothing of the journal yet."""
        return Ledger(run=run, edition=self.edition, folded=self.folded)

    @property
    def cursor(self) -> Cursor:
        return Cursor(dict(self.offsets))

    def failed(self, reason: str) -> None:
        """Note down why the sink fails, in one line, and since when."""
        self.error = textwrap.shorten(reason, 500, placeholder=" ...")
        self.since = self.since or time.time()

    def recovered(self) -> None:
        self.error = self.since = None

    def save(self, file: Path) -> None:
        """Write the ledger, without secrets that an error may quote. Raises OSError."""
        self.pid = os.getpid()
        file.parent.mkdir(exist_ok=True)
        storage.write_atomically(file, orjson.dumps(redaction.tree(asdict(self)), option=orjson.OPT_INDENT_2))


def load(file: Path) -> Ledger:
    """Read a ledger; a new one where there is none that can be read."""
    with contextlib.suppress(OSError, orjson.JSONDecodeError, TypeError):
        return Ledger(**orjson.loads(file.read_bytes()))
    return Ledger()


def file_of(directory: RunDirectory, sink: str) -> Path:
    return directory.sinks / f"{sink}.json"


def lock_of(directory: RunDirectory, sink: str) -> Path:
    """Locked by the follower that ships this run to this sink."""
    return directory.sinks / f"{sink}.lock"
