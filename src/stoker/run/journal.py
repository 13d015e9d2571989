"""The journal: append-only events, a JSON object a line, one file a writer.

An append is one `write` to a file opened for appending, so it survives the death of the
process at once and the machine's after the next flush to disk (`sync_every` seconds). A
line that was cut off is skipped by every reader; a writer never writes behind one, since
every attempt has a file of its own.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

Event = dict[str, Any]

_FILE = re.compile(r"attempt-(\d{4,})\.rank-(\d+)\.jsonl")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JournalWriter:
    """Appends events to one file of a journal. Not for use by several threads at once."""

    def __init__(self, file: Path, sync_every: float = 1.0) -> None:
        self.file = file
        self._descriptor = os.open(
            file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
        )
        self._sync_every = sync_every
        self._synced = time.monotonic()
        self._torn = False

    def append(self, kind: str, /, **fields: Any) -> None:
        """Write one event, stamped with the time in seconds since 1970. Raises OSError."""
        line = (
            orjson.dumps({"type": kind, "time": time.time(), **fields}, option=orjson.OPT_SERIALIZE_NUMPY)
            + b"\n"
        )
        if self._torn:  # a full disk cut the last line short: keep the cut apart from this one
            line = b"\n" + line
        self._torn = True
        while line:
            line = line[os.write(self._descriptor, line) :]
        self._torn = False
        if time.monotonic() - self._synced > self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Flush what was appended to disk."""
        os.fdatasync(self._descriptor)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class Cursor:
    """How far a reader has come: bytes read of every journal file, by name."""

    offsets: dict[str, int] = field(default_factory=dict)


def start_attempt(journal: Path) -> tuple[int, JournalWriter]:
    """Open the journal of the next attempt; its number, from 1, is taken by making the file."""
    number = 1 + max((int(m[1]) for m in map(_FILE.fullmatch, _names(journal)) if m), default=0)
    while True:
        try:
            return number, JournalWriter(journal / f"attempt-{number:04d}.rank-0.jsonl")
        except FileExistsError:
            number += 1


def read(
    journal: Path, cursor: Cursor | None = None, *, limit: int | None = None, until: Cursor | None = None
) -> Iterator[Event]:
    """The events past the cursor, in the order of attempts; each has its `attempt`.

    The cursor moves with every event yielded. A last line without its newline is left for
    the next call (or for ever, where its writer died); a line that is no event is skipped.
    At most `limit` events are read, and none past `until`.
    """
    cursor = cursor if cursor is not None else Cursor()
    for name in _names(journal):
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        with (journal / name).open("rb") as file:
            file.seek(cursor.offsets.get(name, 0))
            for line in file:
                if not line.endswith(b"\n") or _reached(until, cursor, name):
                    break
                if limit is not None and limit <= 0:
                    return
                cursor.offsets[name] = cursor.offsets.get(name, 0) + len(line)
                event = _parse(line)
                if event is not None:
                    if limit is not None:
                        limit -= 1
                    yield {"attempt": int(match[1]), **event}


def encode_values(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metric values for JSON, which knows no NaN and no infinity: those become texts."""
    return {key: value if math.isfinite(value) else _spell(value) for key, value in values.items()}


def decode_values(values: Mapping[str, float | str]) -> dict[str, float]:
    """The inverse of `encode_values`."""
    return {key: _NON_FINITE[v] if isinstance(v, str) else v for key, v in values.items()}


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(line: bytes) -> Event | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None


def _reached(until: Cursor | None, cursor: Cursor, name: str) -> bool:
    return until is not None and cursor.offsets.get(name, 0) >= until.offsets.get(name, 0)


def _names(journal: Path) -> list[str]:
    return sorted(p.name for p in journal.iterdir()) if journal.is_dir() else []
