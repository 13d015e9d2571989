"""Where the study of a search is stored: Optuna's journal in a file, or a database that controllers share.

Entries that belong together are appended to the journal atomically, so that a killed search leaves no
half-created trial.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from stoker.errors import BadInput, StokerError
from stoker.tune import record
from stoker.tune.tables import Tables
from stoker.words import first_line

_NAMED = "CONCAT('stoker.', MD5(DATABASE()))"  # names of locks are those of the server
_MYSQL = (f"SELECT GET_LOCK({_NAMED}, {365 * 24 * 3600})", f"SELECT RELEASE_LOCK({_NAMED})")
_LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(7823846)", "SELECT pg_advisory_unlock(7823846)"),
    "mysql": _MYSQL, "mariadb": _MYSQL,
}  # fmt: skip
"""The statements that take and release a lock shared by all controllers, by SQLAlchemy dialect."""


_SQLITE = re.compile(r"^(sqlite(?:\+\w+)?:///)(?!:memory:|file:)([^?]+)")
"""The URL of a file of SQLite, up to its options."""


class Kept(Protocol):
    """The storage of a study."""

    storage: BaseStorage

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Make the writes within this block atomic, if the storage supports it."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let only one controller at a time execute this block, if there may be several."""
        ...

    def sync(self) -> None:
        """Flush what was written to disk."""
        ...


class Database:
    """Optuna's tables in a database, which several controllers may share.

    Each statement is durable on its own. If a controller died before it had drawn all values of a trial, the
    controller that takes the trial over draws the rest as it would have been (with `qmc`, of the next point).

    Args:
        new: create a file of SQLite and the tables if they do not exist.

    Raises:
        BadInput: the database cannot be used, or its driver is not installed.
    """

    def __init__(self, url: str, *, new: bool = True) -> None:
        file = _SQLITE.match(url := absolute(url))
        if not new and file is not None and not Path(file[2]).exists():
            raise BadInput(f"--storage {url}: there is no file {file[2]}")
        url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)  # the driver that stoker installs
        try:
            tables = _tables(url) if new else Tables(url, new=False)
        except ImportError as error:
            raise BadInput(
                f"--storage {record.shown(url)}: the database driver is not installed: {error}; for "
                "PostgreSQL: pip install psycopg2-binary"
            ) from error
        except Exception as error:  # of SQLAlchemy or of any driver
            said = first_line(error)
            raise BadInput(f"--storage {record.shown(url)} cannot be used: {said}") from error
        self.storage: BaseStorage = tables
        self._tables, self._engine = tables, tables.engine

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: each statement is written on its own."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let only one controller at a time execute this block, on PostgreSQL, MySQL and MariaDB.

        This uses a lock of the database, which is released when its connection ends, however the process
        ends. Raises StokerError if the database refuses it.
        """
        take, give = _LOCKS.get(self._engine.dialect.name, ("", ""))
        if not take:
            yield
            return
        from sqlalchemy.exc import DBAPIError

        connection = self._tables.patiently(lambda: self._locked(take))
        try:
            yield
        finally:
            with contextlib.suppress(DBAPIError):  # the connection is lost, and the lock with it
                connection.exec_driver_sql(give)
                connection.close()

    def _locked(self, take: str) -> Any:
        """A connection that holds the lock. Raises StokerError."""
        connection = self._engine.connect()
        try:
            if connection.exec_driver_sql(take).scalar() in (0, None):  # MySQL's answers without the lock
                raise StokerError(f"{self._engine.url.database}: the database gives no lock")
        except BaseException:
            connection.close()
            raise
        return connection

    def sync(self) -> None:
        """Does nothing: each statement is durable already."""


def absolute(url: str) -> str:
    """A database's URL that means the same in every folder."""
    return _SQLITE.sub(lambda found: found[1] + str(Path(found[2]).absolute()), url)


def _tables(url: str, tries: int = 5) -> Tables:
    """Optuna's tables, created if missing; retries if other controllers create them at the same time."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    try:
        return Tables(url)
    except (IntegrityError, ProgrammingError, OperationalError) as error:
        if tries == 1 or (isinstance(error, OperationalError) and "already exists" not in str(error)):
            raise
        time.sleep(0.5)
        return _tables(url, tries - 1)


class JournalFile(BaseJournalBackend):
    """Optuna's journal in a file, in the format of its `JournalFileBackend`: one JSON object per line.

    The kernel releases the file lock however the process that holds it ends, and `together` makes several
    entries one write. An appended entry survives the end of the process; it survives a power cut once `sync`
    has returned.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._logs: list[dict[str, Any]] = []
        self._read = 0  # bytes of the file that `_logs` contains
        self._held: list[dict[str, Any]] | None = None
        with self._locked():
            self._cut_torn_line()
        self._optunas = JournalStorage(self)
        self.storage: BaseStorage = self._optunas

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The entries from the given number on."""
        self._take_in()
        held = self._held or []
        return [*self._logs[log_number_from:], *held[max(0, log_number_from - len(self._logs)) :]]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries in one write; within `together`, at the end of the block."""
        if self._held is not None:
            self._held += logs
            return
        lines = b"".join(_line(entry) for entry in logs)
        with self._locked():
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, lines) < len(lines):  # the disk is full
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if size == self._read:  # no other process has appended: no need to read the file again
                self._logs += logs
                self._read += len(lines)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Append all entries of this block in one write, or none of them if an exception is raised."""
        self._take_in()
        self._held = []
        try:
            yield
            held, self._held = self._held, None
            if held:
                self.append_logs(held)
        except BaseException:
            self._held = None
            JournalStorage.__init__(self._optunas, self)  # reset: it has read entries that were not written
            raise

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the only controller holds the lock of the sweep's folder."""
        return contextlib.nullcontext()

    def sync(self) -> None:
        """Flush the journal to disk."""
        os.fsync(self._descriptor)

    def _take_in(self) -> None:
        if self._held is not None:  # within `together`, entries of other processes are not read
            return
        size = os.fstat(self._descriptor).st_size
        if size <= self._read:
            return
        found = os.pread(self._descriptor, size - self._read, self._read)
        whole = found[: found.rfind(b"\n") + 1]
        self._logs += [json.loads(line) for line in whole.splitlines()]
        self._read += len(whole)

    def _cut_torn_line(self) -> None:
        """Remove an incomplete entry that a power cut left at the end."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0)
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _line(entry: dict[str, Any]) -> bytes:
    """An entry as a line of the journal, by orjson unless it may contain NaN, which orjson writes as null."""
    try:
        line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        line = b"null"
    if b"null" in line:
        return f"{json.dumps(entry, separators=(',', ':'))}\n".encode()
    return line
