"""A lease on a run that several machines can reach: which of them trains it.

The lock of a run is one of a kernel. Where a runs folder is shared (NFS and the like, an object
store) its holder also takes a lease: a small object `lease/0007`, made under a new number, which no
two can make, and rewritten every few seconds. One that stands unchanged for a minute is of a process
that is gone, and the next number may be taken: the clocks of two machines are not compared. Whoever
finds a number above its own has lost the run, and ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson
from stoker import object_store, storage
from stoker.errors import BadInput, StokerError
from stoker.object_store import Store, Unreachable

log = logging.getLogger("stoker")

FOLDER = "lease"
BEAT = 5.0  # seconds between two writings of a lease
EXPIRES = 60.0  # seconds that one stands unchanged before it is taken from its holder
PATIENCE = 10.0  # seconds that a store is tried for
_LOOK = 0.5
_UNKNOWN = ""


@dataclass(frozen=True)
class Holder:
    """Whose a lease is."""

    id: str
    host: str
    pid: int
    locks: str
    """Where its lock of the run holds: another holder there has found the lock free."""
    beat: int = 0
    at: float = 0.0
    """When it was written, in seconds since 1970, for people."""
    released: bool = False

    @classmethod
    def of(cls, content: bytes) -> Holder:
        """The one that a lease tells of; where that was cut off, one of whom nothing is known."""
        try:
            return cls(**orjson.loads(content))
        except (orjson.JSONDecodeError, TypeError):
            return cls(_UNKNOWN, "another machine", 0, "")


class Place(Protocol):
    """Where leases of a run stand."""

    @property
    def where(self) -> str: ...
    def numbers(self) -> list[int]: ...
    def read(self, number: int) -> bytes: ...
    def write(self, number: int, content: bytes, *, new: bool) -> None: ...
    def remove(self, number: int) -> None: ...


@dataclass(frozen=True)
class InFolder:
    """Leases as files."""

    folder: Path

    @property
    def where(self) -> str:
        return str(self.folder)

    def numbers(self) -> list[int]:
        return sorted(int(file.name) for file in self.folder.glob("[0-9]*") if file.name.isdigit())

    def read(self, number: int) -> bytes:
        return self._file(number).read_bytes()

    def write(self, number: int, content: bytes, *, new: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if new:
            storage.write_new(self._file(number), content)
        else:
            storage.write_atomically(self._file(number), content)

    def remove(self, number: int) -> None:
        self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}"


@dataclass(frozen=True)
class InStore:
    """Leases as objects below a run's key."""

    store: Store
    run: str

    @property
    def where(self) -> str:
        return f"{self.store.url}/{self.run}"

    def numbers(self) -> list[int]:
        found = (key.rpartition("/")[2] for key in self.store.objects(f"{self.run}/{FOLDER}"))
        return sorted(int(name) for name in found if name.isdigit())

    def read(self, number: int) -> bytes:
        return self.store.read(self._key(number))

    def write(self, number: int, content: bytes, *, new: bool) -> None:
        self.store.write(self._key(number), content, new=new)

    def remove(self, number: int) -> None:
        self.store.remove(self._key(number))

    def _key(self, number: int) -> str:
        return f"{self.run}/{FOLDER}/{number:08d}"


def of(run: Path, patience: float = PATIENCE) -> Lease | None:
    """The lease of a run's directory; None if its lock is enough, on a local disk.

    Args:
        patience: seconds to keep trying an object store that does not answer.
    """
    store = object_store.of(run.parent.parent)
    if store is not None:
        store = dataclasses.replace(store, patience=patience)
        place = InStore(store, f"{run.parent.name}/{run.name}")
        here = f"{store.copy} {storage.reach_of_locks(run)}"  # a home may be on several machines
        return Lease(place, here, run, run / FOLDER / "here")
    if not storage.is_shared(run):
        return None
    return Lease(InFolder(run / FOLDER), storage.reach_of_locks(run), run, None)


class Lease:
    """One process's lease of a run whose lock it holds.

    Args:
        locks: where that lock holds.
        run: what it is a lease of, as messages name it.
        note: a file of this machine to remember the newest one taken here in, so that a run may go on here
            while a store is away.
    """

    def __init__(self, place: Place, locks: str, run: Path, note: Path | None) -> None:
        self._place, self._locks, self._run, self._note = place, locks, run, note
        self._number = 0
        self._id = uuid.uuid4().hex
        self._beat = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> bool:
        """Take a free lease, or the lease of a holder that is gone.

        Returns whether this machine had it before: then no other machine has anything newer of the run.

        Raises BadInput if another process trains the run; Unreachable if a store does not answer and this
        machine was not the last to train the run.
        """
        try:
            return self._take()
        except Unreachable as error:
            self._number, self._id = self.taken_here
            if self._number == 0:
                raise
            log.warning("%s; continuing with the local copy", error)
            return True

    def keep(self, lost: Callable[[str], None]) -> None:
        """Keep it, in a thread, until `release`; `lost` is called once it is another's."""
        self._thread = threading.Thread(target=self._keep, args=(lost,), name="lease", daemon=True)
        self._thread.start()

    def check(self, lost: Callable[[str], None]) -> None:
        """Look now whether it is another's, in a shared folder: `lost` is called then. Raises OSError.

        A store is not asked: another machine writes to a copy of its own there.
        """
        if self._note is None and not self.standing():
            lost(self._said_of_loss)

    def release(self) -> None:
        """Let go of it, so that the next holder need not wait."""
        self.end_keeping()
        with contextlib.suppress(StokerError, OSError):
            if self.standing():
                self._place.write(self._number, self._content(released=True), new=False)

    def end_keeping(self) -> None:
        """Renew it no more, and watch no more whether it is lost."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def standing(self) -> bool:
        """Whether nobody has taken it since. Raises Unreachable."""
        return self._is_newest(self._number, self._id)

    def standing_here(self) -> bool:
        """Whether the newest one was taken on this machine, by whichever process. Raises Unreachable."""
        number, of = self.taken_here
        return number > 0 and self._is_newest(number, of)

    def _is_newest(self, number: int, of: str) -> bool:
        newest = max(self._place.numbers(), default=0)
        if newest != number:
            return newest < number
        try:
            return number == 0 or Holder.of(self._place.read(number)).id in (of, _UNKNOWN)
        except FileNotFoundError:
            return True

    def _take(self) -> bool:
        number = max(self._place.numbers(), default=0)
        was_here = self.standing_here()
        try:
            if number:
                self._await_end_of(number)
            self._make(number + 1)
        except FileNotFoundError as error:
            if number == 0:
                raise BadInput(f"{self._place.where} cannot be written to: it does not exist") from error
            raise BadInput(f"another process has begun to train {self._run} just now") from error
        except FileExistsError as error:
            raise BadInput(f"another process has begun to train {self._run} just now") from error
        self._number = number + 1
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            storage.write_atomically(self._note, f"{self._number} {self._id}".encode())
        for old in self._place.numbers():
            if old < self._number:
                self._place.remove(old)
        return was_here

    def _make(self, number: int) -> None:
        """Write a lease that is new. Raises FileExistsError where another process has."""
        try:
            self._place.write(number, self._content(), new=True)
        except FileExistsError:
            if Holder.of(self._place.read(number)).id != self._id:
                raise
            # ours: it was written, and the answer was lost

    def _await_end_of(self, number: int) -> None:
        """Wait until its holder is known to be gone. Raises BadInput where it is not."""
        first = self._place.read(number)
        holder = Holder.of(first)
        if holder.released or holder.locks == self._locks:
            return
        log.info(
            "%s had this run: waiting up to %.0f s to see whether it still trains it", holder.host, EXPIRES
        )
        deadline = time.monotonic() + EXPIRES
        while time.monotonic() < deadline:
            time.sleep(_LOOK)
            now = Holder.of(self._place.read(number))
            if now.released:
                return
            if now.beat != holder.beat:
                raise BadInput(f"process {holder.pid} on {holder.host} is training {self._run} now")

    def _keep(self, lost: Callable[[str], None]) -> None:
        while not self._ended.wait(BEAT):
            try:
                if not self.standing():
                    lost(self._said_of_loss)
                    return
                self._beat += 1
                self._place.write(self._number, self._content(), new=False)
            except (StokerError, OSError) as error:
                log.debug("the lease was not renewed: %s", error)

    @property
    def _said_of_loss(self) -> str:
        return f"another process is training {self._run} now: this one gave no sign of life for too long"

    def _content(self, released: bool = False) -> bytes:
        holder = Holder(
            self._id, platform.node(), os.getpid(), self._locks, self._beat, time.time(), released
        )
        return orjson.dumps(dataclasses.asdict(holder))

    @property
    def taken_here(self) -> tuple[int, str]:
        """The newest lease taken on this machine, its number and id; 0 where none was, or is remembered."""
        try:
            said = self._note.read_text(encoding="ascii") if self._note is not None else "0"
            number, _, of = said.partition(" ")
            return int(number), of
        except (OSError, ValueError):
            return 0, ""


def held_elsewhere(run: Path) -> str:
    """The host that trains a run according to its lease, for display; empty if there is none.

    This compares the clocks of both machines and uses the last local copy; `Lease.take` makes sure.
    """
    try:
        newest = max((file for file in (run / FOLDER).iterdir() if file.name.isdigit()), default=None)
        holder = Holder(**orjson.loads(newest.read_bytes())) if newest is not None else None
    except (OSError, orjson.JSONDecodeError, TypeError):
        return ""
    if holder is None or holder.released or time.time() - holder.at > EXPIRES:
        return ""
    store = object_store.of(run.parent.parent)
    reach = storage.reach_of_locks(run)
    here = f"{store.copy} {reach}" if store is not None else reach
    return holder.host if holder.locks != here else ""
