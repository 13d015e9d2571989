"""The journal: append-only events, one JSON object per line, one file per writer.

An append is one `write` to a file opened for appending: it survives a crash of the process at once, and a
crash of the machine after the next flush to disk (`sync`). Readers skip a line that was cut off. A killed
writer's file is never appended to: each rank of an attempt has its own file, and so has each command that
adds to a run from outside.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import redaction
from stoker.run.values import encodable

Event = dict[str, Any]

FROM_OUTSIDE = 0
"""The attempt number of events that were written from outside the attempts, such as tags and notes."""

_ATTEMPT = re.compile(r"attempt-(\d{4,})\.rank-(\d+)\.jsonl")
_CONTROL = re.compile(r"control-\d+\.jsonl")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_dumps, _now, _NEWLINE = orjson.dumps, time.time, orjson.OPT_APPEND_NEWLINE  # looked up once
_OF_NUMBERS = frozenset({"metrics", "system", "spent"})  # frequent, and without text that could hold secrets
_BLOCK = 1 << 20  # bytes parsed at once
_TAIL = 1 << 12  # bytes read at once in the search for the last newline


class JournalWriter:
    """Appends events to one file of a journal, each with one write. Thread-safe.

    Raises FileExistsError if the file exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = os.open(
            file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
        )
        self._torn = False
        self._one = threading.RLock()  # held for a whole line, which may take several writes
        self._unsynced: OSError | None = None

    def append(self, kind: str, /, **fields: Any) -> None:
        """Write one event with the current time in seconds since 1970, with secrets redacted.

        Like `append_values`, raises OSError, and ValueError after `close`.
        """
        if kind not in _OF_NUMBERS:
            fields = redaction.tree(fields)
        event = {"type": kind, "time": time.time(), **fields}
        options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        try:
            line = orjson.dumps(event, option=options)
        except TypeError:
            if kind in ("artifact", "used"):
                raise ValueError(f"a file of {fields.get('name')!r} has a name that is not UTF-8") from None
            line = orjson.dumps(encodable(event), option=options)
        self._write(line)

    def append_values(self, step: int, values: Mapping[str, float]) -> None:
        """Write finite metric values, as `append` does but faster."""
        line = _dumps({"type": "metrics", "time": _now(), "step": step, "values": values}, None, _NEWLINE)
        self._write(line)

    def _write(self, line: bytes) -> None:
        with self._one:
            if self._torn:  # a full disk cut the last line short: end that line first
                line = b"\n" + line
            written = self._write_some(line)
            self._torn = written < len(line)
            while self._torn:
                line = line[written:]
                written = self._write_some(line)
                self._torn = written < len(line)

    def _write_some(self, line: bytes) -> int:
        try:
            return os.write(self._descriptor, line)
        except OSError:
            if self._descriptor < 0:
                raise ValueError(
                    "this run has ended: log within its `with` block, or open the run again by its name"
                ) from None
            raise

    def sync(self) -> None:
        """Flush everything appended to disk; can be called from another thread than `append`.

        After a failure, every call raises OSError: the kernel reports a failed flush only once, and the next
        flush does not write the data that was lost.
        """
        if self._unsynced is not None:
            raise OSError(self._unsynced.errno, self._unsynced.strerror, str(self.file))
        if self._descriptor >= 0:
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._unsynced = error
                raise

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


@dataclass
class Cursor:
    """A reader's position: the bytes read of each journal file, by name."""

    offsets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Damage:
    """A line that is not a valid event: its file, line number (from 1), and what is wrong with it."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Block:
    """A part of one journal file: its events with their line numbers, and its damaged lines."""

    file: str
    attempt: int
    rank: int
    events: list[Event]
    lines: range | list[int]
    damage: list[Damage]


def start_attempt(journal: Path) -> tuple[int, JournalWriter]:
    """Open the journal of the next attempt. Creating the file claims its number, which counts from 1."""
    number = 1 + max((int(m[1]) for m in map(_ATTEMPT.fullmatch, _names(journal)) if m), default=0)
    while True:
        try:
            return number, join_attempt(journal, number, rank=0)
        except FileExistsError:
            number += 1


def ranks(journal: Path, attempt: int) -> int:
    """The number of ranks that have opened their journal of an attempt."""
    return sum(int(m[1]) == attempt for m in map(_ATTEMPT.fullmatch, _names(journal)) if m)


def newest_attempt(journal: Path) -> tuple[int, Event] | None:
    """The newest attempt and its first event, once it has been written."""
    numbers = [int(m[1]) for m in map(_ATTEMPT.fullmatch, _names(journal)) if m and m[2] == "0"]
    if not numbers:
        return None
    with _file_of(journal, max(numbers), 0).open("rb") as file:
        event = _parse(file.readline())
    return (max(numbers), event) if isinstance(event, dict) else None


def join_attempt(journal: Path, attempt: int, rank: int) -> JournalWriter:
    """Open the journal of one rank of an attempt. Raises FileExistsError if it exists."""
    return JournalWriter(_file_of(journal, attempt, rank))


def has_joined(journal: Path, attempt: int, rank: int) -> bool:
    """Whether a rank has opened its journal of an attempt."""
    return _file_of(journal, attempt, rank).exists()


def control(journal: Path) -> JournalWriter:
    """Open a new journal file for a command that adds to a run from outside, alive or not."""
    while True:
        try:
            return JournalWriter(journal / f"control-{time.time_ns()}.jsonl")
        except FileExistsError:
            continue


def note_failure(journal: Path, attempt: int, error: str, *, raised: bool = False, status: str = "") -> None:
    """Record from outside why an attempt failed; does nothing if that cannot be written.

    Args:
        raised: whether a rank raised an exception: then the attempt has failed, even if rank 0 was ended
            before it could say so.
        status: how the attempt ended, unless it ended as it should: what rank 0 says of an error may be the
            consequence of what its launcher knows. Empty if the launcher knows no more than it.
    """
    known = {"status": status} if status else {}
    with contextlib.suppress(OSError):
        writer = control(journal)
        writer.append("attempt_failed", of=attempt, error=error, raised=raised, **known)
        writer.close()


def read(
    journal: Path, cursor: Cursor | None = None, *, limit: int | None = None, until: Cursor | None = None
) -> Iterator[Event]:
    """The events after the cursor, in the order of attempts, each with its `attempt` and `rank`.

    The cursor moves with each event yielded. A last line without a newline is left for the next call (for
    ever, if its writer was killed); lines that are not valid events are skipped. Reads at most `limit`
    events, and none past `until`.
    """
    cursor = cursor if cursor is not None else Cursor()
    for name in _names(journal):
        writer = _writer(name)
        if writer is None:
            continue
        attempt, rank = writer
        with (journal / name).open("rb") as file:
            file.seek(cursor.offsets.get(name, 0))
            for line in file:
                if not line.endswith(b"\n") or _reached(until, cursor, name):
                    break
                if limit is not None and limit <= 0:
                    return
                cursor.offsets[name] = cursor.offsets.get(name, 0) + len(line)
                event = _parse(line)
                if isinstance(event, dict):
                    if limit is not None:
                        limit -= 1
                    yield {"attempt": attempt, "rank": rank, **event}


def read_blocks(journal: Path) -> Iterator[Block]:
    """The whole journal, in the order of attempts, in blocks of one file each.

    Much faster than `read` on a long journal, because a block is parsed at once. Reports damaged lines,
    except a last line without a newline, whose writer was killed or is still writing.
    """
    for name in _names(journal):
        writer = _writer(name)
        if writer is None:
            continue
        line, rest = 1, b""
        with (journal / name).open("rb") as file:
            while chunk := file.read(_BLOCK):
                body, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline:
                    yield _block(name, *writer, body, line)
                    line += body.count(b"\n") + 1


def sizes(journal: Path) -> dict[str, int]:
    """The size in bytes of each journal file, by name; if the sizes are unchanged, so is the journal."""
    return {name: (journal / name).stat().st_size for name in _names(journal) if _writer(name)}


def ends(journal: Path) -> dict[str, int]:
    """The end of the last complete line in each journal file, in bytes, where `read` stops."""
    return {name: _end(journal / name) for name in _names(journal) if _writer(name)}


def _end(file: Path) -> int:
    with file.open("rb") as opened:
        end = opened.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _TAIL)
            opened.seek(begin)
            if newline := opened.read(end - begin).rfind(b"\n") + 1:
                return begin + newline
            end = begin
    return 0


def encode_values(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metric values for JSON, which has no NaN and infinities: these become strings."""
    return {key: encode(value) for key, value in values.items()}


def decode_values(values: Mapping[str, float | str]) -> dict[str, float]:
    """The inverse of `encode_values`."""
    return {key: decode(value) for key, value in values.items()}


def encode(value: float) -> float | str:
    """One metric value for JSON."""
    return value if math.isfinite(value) else _spell(value)


def decode(value: Any) -> float:
    """The inverse of `encode`. Raises ValueError or TypeError."""
    if isinstance(value, str):
        if value not in _NON_FINITE:
            raise ValueError(f"{value!r} is not a number")
        return _NON_FINITE[value]
    return float(value)


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def goes_on(journal: Path, attempt: int) -> bool:
    """Whether a later attempt, or somebody outside of all, has written to a journal."""
    writers = filter(None, (_writer(file.name) for file in journal.iterdir()))
    return any(number > attempt or number == FROM_OUTSIDE for number, _ in writers)


def _file_of(journal: Path, attempt: int, rank: int) -> Path:
    return journal / f"attempt-{attempt:04d}.rank-{rank}.jsonl"


def _writer(name: str) -> tuple[int, int] | None:
    """The attempt and rank that wrote a journal file; None if the file is not part of the journal."""
    if match := _ATTEMPT.fullmatch(name):
        return int(match[1]), int(match[2])
    return (FROM_OUTSIDE, 0) if _CONTROL.fullmatch(name) else None


def _block(name: str, attempt: int, rank: int, body: bytes, first: int) -> Block:
    lines = range(first, first + body.count(b"\n") + 1)
    try:
        events = orjson.loads(b"[" + body.replace(b"\n", b",") + b"]")
        if len(events) == len(lines) and all(map(_is_event, events)):
            return Block(name, attempt, rank, events, lines, [])
    except orjson.JSONDecodeError:
        pass
    found = [(line, _parse(text)) for line, text in zip(lines, body.split(b"\n"), strict=True)]
    good = [(line, event) for line, event in found if isinstance(event, dict)]
    damage = [Damage(name, line, reason) for line, reason in found if isinstance(reason, str) and reason]
    return Block(name, attempt, rank, [e for _, e in good], [line for line, _ in good], damage)


def _parse(line: bytes) -> Event | str:
    """The event on a line, or what is wrong with the line: an empty string for an empty line."""
    if not line.strip():
        return ""
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    return event if _is_event(event) else "JSON, but not an event"


def _is_event(value: Any) -> bool:
    return type(value) is dict and type(value.get("type")) is str and type(value.get("time")) in (float, int)


def _reached(until: Cursor | None, cursor: Cursor, name: str) -> bool:
    return until is not None and cursor.offsets.get(name, 0) >= until.offsets.get(name, 0)


def _names(journal: Path) -> list[str]:
    return sorted(p.name for p in journal.iterdir()) if journal.is_dir() else []
