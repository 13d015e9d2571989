"""Leases: which machine trains a run that several machines can reach.

The lock of a run is a file lock, which only works within one machine. If the runs folder is shared (NFS and
the like, or an object store), the process that holds the lock also takes a lease: a small object such as
`lease/00000007`, created under a new number, which only one process can do, and rewritten every few seconds.
If a lease stays unchanged for a minute, its process is considered dead, and the next number may be taken;
the clocks of two machines are not compared. A process that finds a number above its own has lost the run,
and ends at once.
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
from stoker import object_store, storage, world
from stoker.errors import EXIT_PREEMPTED, BadInput, StokerError
from stoker.object_store import Store, Unreachable

log = logging.getLogger("stoker")

FOLDER = "lease"
BEAT = 5.0  # seconds between renewals of a lease
EXPIRES = 60.0  # seconds without a renewal after which a lease may be taken over
PATIENCE = 10.0  # seconds to keep trying a store
_LOOK = 0.5
_NONE = 0  # no lease has this number
_UNKNOWN = ""
_NOBODY = "nobody"  # the trainer, as far as a process knows that found no lease


class Busy(BadInput):
    """Another process trains the run. Where a scheduler may try again, the exit code asks it to."""

    def __init__(self, said: str) -> None:
        if world.is_unattended():
            said = f"{said}; exit code {EXIT_PREEMPTED} asks for another try later"
            self.exit_code, self.again = EXIT_PREEMPTED, True
        super().__init__(said)


@dataclass(frozen=True)
class Holder:
    """The content of a lease: which process holds it."""

    id: str
    host: str
    pid: int
    locks: str
    """Where its lock of the run is visible: a process that got the lock in the same place need not wait."""
    beat: int = 0
    at: float = 0.0
    """When it was written, in seconds since 1970; for display only."""
    released: bool = False
    trained: str = ""
    """The id of the newest lease under which the run was trained; empty if it is this one."""

    @property
    def trainer(self) -> str:
        """The id of the lease of the process that was the last to train the run."""
        return self.trained or self.id

    @classmethod
    def of(cls, content: bytes) -> Holder:
        """Parse a lease; if it was cut off, the holder is unknown."""
        try:
            return cls(**orjson.loads(content))
        except (orjson.JSONDecodeError, TypeError):
            return cls(_UNKNOWN, "another machine", 0, "")


class Place(Protocol):
    """Where the leases of a run are stored."""

    @property
    def where(self) -> str: ...
    def numbers(self) -> list[int]: ...
    def read(self, number: int) -> bytes: ...
    def write(self, number: int, content: bytes, *, new: bool) -> None: ...
    def remove(self, number: int) -> None: ...


@dataclass(frozen=True)
class LeasesInFolder:
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
class LeasesInStore:
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


def of(run: Path, patience: float = PATIENCE, *, trains: bool = True) -> Lease | None:
    """The lease of a run's directory; None if its lock is enough, on a local disk.

    Args:
        patience: seconds to keep trying an object store that does not answer.
        trains: whether to train under it; see `Lease`.
    """
    store = object_store.of(run.parent.parent)
    if store is not None:
        store = dataclasses.replace(store, patience=patience)
        place = LeasesInStore(store, f"{run.parent.name}/{run.name}")
        return Lease(place, _visible_at(run, store), run, run / FOLDER / "here", trains=trains)
    if not storage.is_shared(run):
        return None
    return Lease(LeasesInFolder(run / FOLDER), _visible_at(run, None), run, None, trains=trains)


def _visible_at(run: Path, store: Store | None) -> str:
    """Where the run's lock on this machine is visible, see `Holder.locks`."""
    reach = storage.reach_of_locks(run)
    return f"{store.copy} {reach}" if store is not None else reach  # machines may share a home directory


class Lease:
    """One process's lease of a run whose lock it holds.

    Args:
        locks: where that lock is visible, see `Holder.locks`.
        run: the run's directory, for messages.
        note: a local file that records the newest lease under which this machine trained the run, written
            once it has all of the run. So the run can continue here while the store cannot be reached.
        trains: whether the run is trained under this lease, and not only kept from being trained.
    """

    def __init__(
        self, place: Place, locks: str, run: Path, note: Path | None, *, trains: bool = True
    ) -> None:
        self._place, self._locks, self._run, self._note = place, locks, run, note
        self._trains, self._trained = trains, ""
        self._number = 0
        self._id = uuid.uuid4().hex
        self._beat = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> bool:
        """Take a free lease, or one whose holder is gone.

        Returns whether this machine was the last to train the run: then no other one has anything newer of
        it. If not, what is newer must be fetched before `note_here`.

        Raises Busy if another process trains the run; Unreachable if a store does not answer and, as far
        as known, this machine was not the last to train the run.
        """
        was_here = bool(self._noted)
        try:
            was_here = self.standing_here()
            self._take(was_here)
        except Unreachable as error:
            if not was_here:
                raise
            self._number, self._id = self._noted[0]
            log.warning("%s; continuing with the local copy", error)
        return was_here

    def note_here(self) -> None:
        """Record that this machine has all of the run and trains it under this lease."""
        if self._trains and (self._number, self._id) not in self._noted[:1]:
            self._write_note((self._number, self._id))

    def keep(self, lost: Callable[[str], None]) -> None:
        """Renew the lease in a thread until `release`; calls `lost` if another process has taken it."""
        self._thread = threading.Thread(target=self._keep, args=(lost,), name="lease", daemon=True)
        self._thread.start()

    def check(self, lost: Callable[[str], None]) -> None:
        """In a shared folder, call `lost` if another process has taken the lease. Raises OSError.

        Does nothing for an object store, where each machine writes to its own working copy.
        """
        if self._note is None and not self.standing():
            lost(self._said_of_loss)

    def release(self) -> None:
        """Release the lease, so that the next holder need not wait."""
        self.end_keeping()
        with contextlib.suppress(StokerError, OSError):
            if self.standing():
                self._place.write(self._number, self._content(released=True), new=False)

    def end_keeping(self) -> None:
        """Stop renewing the lease and checking whether it is lost."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def standing(self) -> bool:
        """Whether no other process has taken the lease since. Raises Unreachable."""
        return self._is_newest(self._number, self._id)

    def standing_here(self) -> bool:
        """Whether this machine was the last to train the run, in any process. Raises Unreachable."""
        noted = self._noted
        if not noted:
            return False
        newest = max(self._place.numbers(), default=0)
        if newest == 0:  # somebody deleted it
            return True
        try:
            trainer = Holder.of(self._place.read(newest)).trainer
        except FileNotFoundError:
            return False
        if trainer == _UNKNOWN:
            return newest == noted[0][0]
        return trainer == _NOBODY or trainer in {of for _, of in noted}

    def _is_newest(self, number: int, of: str) -> bool:
        newest = max(self._place.numbers(), default=0)
        if newest != number:
            return newest == 0  # somebody deleted it
        try:
            return number == 0 or Holder.of(self._place.read(number)).id in (of, _UNKNOWN)
        except FileNotFoundError:
            return True

    def _take(self, was_here: bool) -> None:
        number = max(self._place.numbers(), default=0)
        try:
            if number:
                self._await_end_of(number)
            self._place.remove(_NONE)  # whoever may not delete is refused before anything is written
            if not self._trains:
                self._trained = Holder.of(self._place.read(number)).trainer if number else _NOBODY
            elif was_here:  # also if this process is killed before it knows that it has the lease
                self._write_note(*self._noted, (number + 1, self._id))
            self._make(number + 1)
        except FileNotFoundError as error:
            if number == 0:
                raise BadInput(f"{self._place.where} cannot be written to: it does not exist") from error
            raise Busy(f"another process has begun to train {self._run} just now") from error
        except FileExistsError as error:
            raise Busy(f"another process has begun to train {self._run} just now") from error
        self._number = number + 1
        for old in self._place.numbers():
            if old < self._number:
                self._place.remove(old)

    def _make(self, number: int) -> None:
        """Create a lease. Raises FileExistsError if another process has created it."""
        try:
            self._place.write(number, self._content(), new=True)
        except FileExistsError:
            if Holder.of(self._place.read(number)).id != self._id:
                raise
            # it is ours: it was written, but the answer of the store was lost

    def _await_end_of(self, number: int) -> None:
        """Wait until the holder of a lease is known to have ended. Raises Busy if it is alive."""
        first = self._place.read(number)
        holder = Holder.of(first)
        if holder.released or holder.locks == self._locks:
            return
        log.info(
            "%s had this run: waiting up to %.0f s to see whether it still trains it", holder.host, EXPIRES
        )
        left = EXPIRES
        while left > 0:
            slept = time.monotonic()
            time.sleep(_LOOK)
            looked = time.monotonic()
            now = Holder.of(self._place.read(number))
            if now.released:
                return
            if now.beat != holder.beat:
                raise Busy(f"process {holder.pid} on {holder.host} is training {self._run} now")
            # Its holder may have been suspended with this process while that slept.
            left -= min(looked - slept, BEAT) + time.monotonic() - looked

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
            self._id, platform.node(), os.getpid(), self._locks, self._beat, time.time(), released,
            self._trained,
        )  # fmt: skip
        return orjson.dumps(dataclasses.asdict(holder))

    @property
    def _noted(self) -> list[tuple[int, str]]:
        """Number and id of the newest lease under which this machine trained the run, if it did.

        After it come those that it was about to take, if it does not know whether it got them.
        """
        try:
            words = self._note.read_text(encoding="ascii").split() if self._note is not None else []
            return [(int(number), of) for number, of in zip(words[::2], words[1::2], strict=True)]
        except (OSError, ValueError):
            return []

    def _write_note(self, *leases: tuple[int, str]) -> None:
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            said = " ".join(f"{number} {of}" for number, of in leases)
            storage.write_atomically(self._note, said.encode())


def held_elsewhere(run: Path) -> str:
    """The host that trains a run according to its lease, for display; empty if there is none.

    This compares the clocks of both machines and uses the last local copy; `Lease.take` makes sure.
    """
    try:
        newest = max((file for file in (run / FOLDER).iterdir() if file.name.isdigit()), default=None)
        holder = Holder.of(newest.read_bytes()) if newest is not None else None
    except OSError:
        return ""
    if holder is None or holder.released or time.time() - holder.at > EXPIRES:
        return ""
    here = _visible_at(run, object_store.of(run.parent.parent))
    return holder.host if holder.locks != here else ""
