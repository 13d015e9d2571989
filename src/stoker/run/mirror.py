"""The copy of a run in an object store, for runs folders in a store.

A run is trained in the working copy on this machine, and uploaded from there (`run/uploader.py`). The journal
is uploaded before the checkpoints, and each checkpoint's manifest last, so the copy in the store can be
resumed at any time. Journal files only grow, and are uploaded in stretches (`run/stretches.py`). The state of
the sinks is not uploaded: on another machine they start again from the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson
from stoker import object_store, storage
from stoker.errors import StokerError
from stoker.object_store import Store, Stored
from stoker.run import lease, stretches, view
from stoker.run.directory import MANIFEST, RunDirectory, step_folder, step_of
from stoker.run.stretches import Stretch

log = logging.getLogger("stoker")

Objects = dict[str, Stored]

_KNOWN = "store.known"
_DELETED = "store.deleted"
_PINS = "uploading"
"""A folder of a run: links to the files of the checkpoint that is being uploaded."""
_ASIDE = ".set-aside"
"""In a runs folder: copies of runs that were deleted in the store, or replaced there by others."""
_BEGINNING = 2**16  # bytes of a journal file, the first of which says which attempt it is of
_HELD = ("attempt.lock", "store.lock", "store.wake")
_LISTINGS = 5  # tries, if the run changes during a download
_OWN = (  # folders that are not copied file by file
    "sinks", "tensorboard", "wandb", "checkpoints", "journal", "lease", "again", _PINS
)  # fmt: skip
_DERIVED = (  # files next to run.json that belong to this machine
    "attempt.lock", "compacted.safetensors", "store.json", "store.lock", "store.wake", _KNOWN, _DELETED
)  # fmt: skip


class Lost(StokerError):
    """Another machine has taken over the run: this one uploads nothing more."""


class Listed(Protocol):
    """A file that the manifest of a checkpoint lists, by its name in the checkpoint's folder."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def xxh3(self) -> str: ...


class Mirror:
    """A run on this machine and its copy in a store."""

    def __init__(self, run: RunDirectory, store: Store, there: Objects | None = None) -> None:
        self._run, self._store = run, store
        self._key = run.name
        self._known: dict[str, list[Any]] = storage.read_json(run.path / _KNOWN)
        """Files that are the same here and in the store, by key: local size and time, tag in the store."""
        self._there = there
        """The objects of the run in the store, by relative key; None before they are listed."""
        self._same: set[str] = set()
        """The journal files here that were compared with their part in the store."""

    @property
    def where(self) -> str:
        return f"{self._store.url}/{self._key}"

    # -- from the store --------------------------------------------------------------------

    def fetch(self, *, artifacts: bool = False, newer_there: bool | None = None) -> None:
        """Download what another machine added: the journal and the manifests of checkpoints.

        Args:
            artifacts: download artifacts and logs as well.
            newer_there: whether another machine has trained the run since; by default found by the lease.
        """
        for left in reversed(range(_LISTINGS)):
            there = self._objects()
            self._note_deletion(there)
            if "run.json" not in there or (self._is_another(there) and not self._set_aside()):
                return
            self._run.make_folders()
            if newer_there is None:
                newer_there = self.taken_elsewhere()
            try:
                self._fetch(there, artifacts=artifacts, newer_there=newer_there)
            except FileNotFoundError:  # the machine that trains the run merged or removed a listed object
                if not left:
                    raise
                self.forget()
            else:
                return

    def make_room(self) -> bool:
        """Set the copy here aside if the run was deleted in the store since, or replaced by another one.

        The lock of the run must be held. Returns whether it was set aside. Raises Unreachable.
        """
        there = self._objects()
        self._note_deletion(there)
        if not (is_deleted(self._run) or self._is_another(there)):
            return False
        self._move_aside()
        return True

    def _is_another(self, there: Objects) -> bool:
        """Whether the store has another run than this machine under the same name. Raises Unreachable."""
        if "run.json" not in there or not self._run.exists():
            return False
        compared = [*_mark(self._run.record_file), there["run.json"].tag]
        if there["run.json"].tag and self._known.get("run.json") == compared:
            return False
        uids = [_uid(self._store.read(f"{self._key}/run.json")), _uid(self._run.record_file.read_bytes())]
        if None not in uids and uids[0] != uids[1]:
            return True
        self._known["run.json"] = compared
        self._remember()
        return False

    def _note_deletion(self, there: Objects) -> None:
        """Note here whether the run, which was in the store once, was deleted there by another machine."""
        note = self._run.path / _DELETED
        if "run.json" in there:
            note.unlink(missing_ok=True)
        elif "run.json" in self._known and self._run.exists():
            note.touch()

    def _set_aside(self) -> bool:
        """Set the copy here aside, unless it is being trained; returns whether it was."""
        lock = storage.try_lock(self._run.lock_file)
        if lock is None:
            return False
        try:
            self._move_aside()
        finally:
            os.close(lock)
        return True

    def _move_aside(self) -> None:
        name = f"{self._run.id}-{(_uid(self._run.record_file.read_bytes()) or 'unknown')[:8]}"
        aside = self._run.runs / _ASIDE / self._run.experiment / name
        aside.mkdir(parents=True, exist_ok=True)
        files = [file for file in self._run.path.iterdir() if file.name not in _HELD]
        for file in sorted(files, key=lambda file: file.name == "run.json"):  # last, so none is left over
            target = aside / file.name
            file.replace(target if not target.exists() else aside / f"{file.name}-{uuid.uuid4().hex[:8]}")
        self._known, self._same = {}, set()
        log.warning(
            "%s was deleted or replaced by another run since it was trained here; what this machine had of "
            "it is now in %s, which may be deleted", self.where, aside,
        )  # fmt: skip

    def _fetch(self, there: Objects, *, artifacts: bool, newer_there: bool) -> None:
        self._fetch_files(there, artifacts=artifacts, newer_there=newer_there)
        self._fetch_lease(there)
        if newer_there:
            self._void_journals(there)
        for name, of_file in stretches.known("journal", there).items():
            self._fetch_journal(self._run.journal / name, of_file)
        if newer_there:
            self._fetch_manifests(there)

    def _fetch_files(self, there: Objects, *, artifacts: bool, newer_there: bool) -> None:
        """Download the files that are missing here or differ from the store."""
        wanted = ("run.json", "provenance/", *(("artifacts/", "logs/") if artifacts else ()))
        for key, stored in there.items():
            file = self._run.path / key
            if not key.startswith((*wanted, "artifacts/", "logs/")):
                continue
            if file.is_file():
                stale = newer_there and self._known.get(key) != [*_mark(file), stored.tag]
            else:
                stale = key.startswith(wanted)
            if stale:
                self._store.get(f"{self._key}/{key}", file)
                self._known[key] = [*_mark(file), stored.tag]
        self._remember()

    def fetch_checkpoint(self, path: Path, listed: Callable[[bytes], Iterable[Listed]]) -> None:
        """Download the manifest of a checkpoint, and its files that do not match it.

        Args:
            listed: checks a manifest, and returns the files that it lists.

        Raises:
            Unreachable: the store does not answer.
            Exception: what `listed` raises; then nothing here has changed.
        """
        key = f"{self._key}/checkpoints/{path.name}"
        try:
            manifest = self._store.read(f"{key}/{MANIFEST}")
            files = listed(manifest)
            path.mkdir(parents=True, exist_ok=True)
            storage.write_atomically(path / MANIFEST, manifest)
            for file in files:
                local = path / file.path
                if not _matches(local, file):
                    log.info("downloading %s of %s from %s", file.path, path.name, self._store.url)
                    self._store.get(f"{key}/{file.path}", local)
        except FileNotFoundError:
            log.debug("%s has no whole %s", self.where, path.name)

    def _void_journals(self, there: Objects) -> None:
        """Set aside journal files of attempts here that another machine did not have when it resumed the run.

        An attempt of that machine may have the same number. The files are kept under another name. The sinks
        start again, because their ledgers record positions in files of the old name.
        """
        known = stretches.known("journal", there)
        for file in self._run.journal.glob("attempt-*.jsonl"):
            if not self._begins_same(file, known.get(file.name, [])[:1], there):
                log.warning("%s was written here and is void: another machine resumed without it", file.name)
                for derived in (*self._run.sinks.glob("*.json"), self._run.compacted):
                    derived.unlink(missing_ok=True)
                file.replace(file.with_suffix(f".void-{uuid.uuid4().hex[:8]}"))
        self._remember()

    def _begins_same(self, file: Path, first: list[Stretch], there: Objects) -> bool:
        """Whether a journal file here begins as the one in the store, where it may have grown since."""
        if not first:
            return False
        key = f"journal/{file.name}"
        stored = there[stretches.key("journal", file.name, 0)]
        compared = [*_inode(file), stored.tag]
        if stored.tag and self._known.get(key) == compared:
            return True
        begin = Stretch(0, min(first[0].end, _BEGINNING))
        (content,) = stretches.read(self._store, f"{self._key}/journal", file.name, [begin], 0)
        with file.open("rb") as source:
            same = bool(content) and content.startswith(source.read(len(content)))
        if same:
            self._known[key] = compared
        return same

    def _fetch_manifests(self, there: Objects) -> None:
        """Take over the checkpoints of the run after another machine resumed it.

        Checkpoints made here after the one that it resumed from are void.
        """
        stand = {step_folder(step) for step in view.fold(self._run, self._run.record()).checkpoints}
        known = self._checkpoints(there)
        for manifest in self._run.checkpoints.glob(f"*/{MANIFEST}"):
            folder = manifest.parent.name
            if folder not in known and folder not in stand:
                log.warning("%s was made here and is void: another machine resumed from before it", folder)
                manifest.unlink()
        for folder in known:
            key = f"checkpoints/{folder}/{MANIFEST}"
            local = self._run.path / key
            if local.is_file() and there[key].tag and self._known.get(key) == [*_mark(local), there[key].tag]:
                continue
            try:
                content = self._store.read(f"{self._key}/{key}")
            except FileNotFoundError:  # the machine that trains the run has removed it since
                continue
            if not local.is_file() or local.read_bytes() != content:
                local.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomically(local, content)
            self._known[key] = [*_mark(local), there[key].tag]
        self._remember()

    def taken_elsewhere(self) -> bool:
        """Whether another machine has trained the run since this one did, if it did. Raises Unreachable."""
        held = lease.of(self._run.path, self._store.patience)
        return held is not None and not held.standing_here()

    def _fetch_lease(self, there: Objects) -> None:
        """Download the newest lease, which names the process that trains the run."""
        folder = self._run.path / lease.FOLDER
        for old in folder.glob("[0-9]*"):
            old.unlink()
        newest = max((key for key in there if key.startswith("lease/")), default=None)
        if newest is not None:
            with contextlib.suppress(FileNotFoundError):
                self._store.get(f"{self._key}/{newest}", self._run.path / newest)

    def _fetch_journal(self, file: Path, there: list[Stretch]) -> None:
        """Append to a local journal file what the store has beyond it."""
        here = file.stat().st_size if file.is_file() else 0
        if not any(stretch.end > here for stretch in there):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as target:
            for content in stretches.read(self._store, f"{self._key}/journal", file.name, there, here):
                target.write(content)

    # -- to the store ----------------------------------------------------------------------

    def push(self) -> None:
        """Upload what is new here. Raises Unreachable; Lost if another machine has taken over the run."""
        manifests = self._run.checkpoints.glob(f"*/{MANIFEST}")
        committed = sorted((file.parent for file in manifests), reverse=True)
        self._still_ours()
        there = self._objects()
        self._check_run(there)
        for file in self._files():
            self._push_file(file, there)
        self._remember()
        known = stretches.known("journal", there)
        for file in sorted(self._run.journal.glob("*.jsonl")):
            of_file = known.get(file.name, [])
            self._check_same(file, of_file)
            stretches.push(self._store, self._key, "journal", file, of_file, there)
        for path in committed:  # the newest first
            self._push_checkpoint(path, there)
            if self._has_newer(committed[0]):  # than all of these: it comes next, and older ones later
                break
        if committed:
            self._still_ours()
            self._remove_others({path.name for path in committed}, there)

    def _has_newer(self, path: Path) -> bool:
        manifests = self._run.checkpoints.glob(f"*/{MANIFEST}")
        return any(step_of(file.parent.name) > step_of(path.name) for file in manifests)

    def _check_run(self, there: Objects) -> None:
        """Raises Lost if the run was deleted in the store, or replaced there by another one.

        A run that is being trained is uploaded anew if somebody deleted it.
        """
        if not self._run.trained_here:
            self._note_deletion(there)
            if is_deleted(self._run):
                raise Lost(f"{self.where} was deleted by another machine")
        if self._is_another(there):
            raise Lost(f"{self.where} is another run, which another machine began since under this name")

    def _check_same(self, file: Path, there: list[Stretch]) -> None:
        """Raises Lost if a journal file is not the one that the store has a part of."""
        if file.name in self._same:
            return
        if not stretches.is_same(self._store, f"{self._key}/journal", file, there):
            raise Lost(
                f"{self.where} has another {file.name} than {self._run.journal}: another machine trained "
                "this run, and nothing is uploaded from here; the next start here continues what is there"
            )
        self._same.add(file.name)

    def push_addition(self, file: Path) -> None:
        """Upload a journal file of a command that adds to a run, whichever machine trains it.

        Its name is unique, and it is not written to again. Raises Unreachable.
        """
        stretches.push(self._store, self._key, "journal", file, [], {})

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint in the store, as of the last listing."""
        found = self._checkpoints(self._there or {})
        return step_of(found[-1]) if found else None

    def _still_ours(self) -> None:
        if self.taken_elsewhere():
            raise Lost(f"another machine was the last to train {self.where}")

    def _files(self) -> Iterator[Path]:
        """The files that are uploaded one by one: small files and what the run made."""
        for file in storage.files_under(self._run.path):
            if _is_copied(file.relative_to(self._run.path)):
                yield file

    def _push_file(self, file: Path, there: Objects) -> None:
        key = file.relative_to(self._run.path).as_posix()
        with contextlib.suppress(FileNotFoundError):  # removed just now
            mark = _mark(file)
            if key not in there or self._known.get(key, [])[:2] != mark:
                self._store.put(f"{self._key}/{key}", file)
                there[key] = Stored(mark[0])
                self._known[key] = [*mark, ""]

    def _push_checkpoint(self, path: Path, there: Objects) -> None:
        """Upload a checkpoint, its manifest last."""
        key = f"checkpoints/{path.name}"
        with contextlib.suppress(FileNotFoundError):  # deleted before its upload began
            mark = _mark(path / MANIFEST)
            manifest = (path / MANIFEST).read_bytes()
            names = _names_in(manifest)
            if not names:  # it is damaged, and must not replace a whole one in the store
                return
            if f"{key}/{MANIFEST}" in there:
                sent = self._known.get(key, [])[:2] == mark
                if sent or self._store.read(f"{self._key}/{key}/{MANIFEST}") == manifest:
                    self._known[key] = [*mark, ""]
                    return
                self._remove(f"{key}/{MANIFEST}", there)  # of another attempt at this step
            with self._pinned(path, names) as pinned:
                for name in names:
                    size = (pinned / name).stat().st_size
                    self._store.put(f"{self._key}/{key}/{name}", pinned / name)
                    there[f"{key}/{name}"] = Stored(size)
            self._still_ours()
            self._store.write(f"{self._key}/{key}/{MANIFEST}", manifest)
            there[f"{key}/{MANIFEST}"] = Stored(len(manifest))
            self._known[key] = [*mark, ""]

    @contextlib.contextmanager
    def _pinned(self, path: Path, names: Iterable[str]) -> Iterator[Path]:
        """Keep a checkpoint's files for this block, though it may be deleted to make room for newer ones.

        Where files cannot be linked, it is used as it is. Raises FileNotFoundError if it is already deleted.
        """
        pins = self._run.path / _PINS
        shutil.rmtree(pins, ignore_errors=True)  # of an uploader that was killed
        pins.mkdir()
        try:
            yield pins if _link(path, names, pins) else path
        finally:
            shutil.rmtree(pins, ignore_errors=True)

    def _remove_others(self, kept: set[str], there: Objects) -> None:
        """Delete from the store the checkpoints that no longer exist here.

        One newer than all here stays, unless it is void: it was lost here, and the next start fetches it.
        All stay as long as the store has none of those that exist here.
        """
        if kept.isdisjoint(self._checkpoints(there)):
            return
        folders = {key.split("/")[1] for key in there if key.startswith("checkpoints/")}
        gone = {f for f in folders - kept if not (self._run.checkpoints / f / MANIFEST).exists()}
        newest = max(step_of(folder) for folder in kept)
        if any(step_of(folder) > newest for folder in gone):
            stand = set(view.fold(self._run, self._run.record()).checkpoints)
            gone = {f for f in gone if step_of(f) < newest or step_of(f) not in stand}
        for folder in gone:
            self.remove_checkpoint(folder)

    def remove(self) -> None:
        """Delete the run from the store."""
        there = self._objects()
        for key in _manifest_first(there):
            self._remove(key, there)

    def remove_checkpoint(self, name: str) -> None:
        """Delete a checkpoint from the store, by the name of its folder. Raises Unreachable."""
        there = self._objects()
        for key in _manifest_first(k for k in there if k.startswith(f"checkpoints/{name}/")):
            self._remove(key, there)

    def _remove(self, key: str, there: Objects) -> None:
        self._store.remove(f"{self._key}/{key}")
        there.pop(key, None)

    # -- what is in the store --------------------------------------------------------------

    def _objects(self) -> Objects:
        if self._there is None:
            found = self._store.objects(self._key)
            self._there = {key.removeprefix(f"{self._key}/"): stored for key, stored in found.items()}
        return self._there

    def _remember(self) -> None:
        """Save which files are the same here and in the store, for the next process."""
        if self._known != storage.read_json(self._run.path / _KNOWN):
            storage.write_json(self._run.path / _KNOWN, self._known)

    def forget(self) -> None:
        """Forget the listing of the store: a request that seemed to fail may have succeeded."""
        self._there = None

    def _checkpoints(self, there: Objects) -> list[str]:
        """The folders of checkpoints that have a manifest in the store, in the order of steps."""
        return sorted(k.split("/")[1] for k in there if k.startswith("checkpoints/") and k.endswith(MANIFEST))


def of(run: RunDirectory, patience: float | None = None) -> Mirror | None:
    """A run's copy in its object store; None if its runs folder is not the working copy of a store.

    Args:
        patience: seconds to keep trying a request; by default that of `Store`.
    """
    store = object_store.of(run.runs)
    if store is not None and patience is not None:
        store = dataclasses.replace(store, patience=patience)
    return Mirror(run, store) if store is not None else None


def is_deleted(run: RunDirectory) -> bool:
    """Whether, as of the last look, a run of which there is a copy here was deleted in its store."""
    return (run.path / _DELETED).exists()


def restore(run: RunDirectory) -> None:
    """Have a run that `is_deleted` uploaded again as a whole."""
    (run.path / _KNOWN).unlink(missing_ok=True)
    (run.path / _DELETED).unlink(missing_ok=True)


def remove(run: RunDirectory) -> None:
    """Delete a run, here and in its object store. Raises Unreachable."""
    copy = of(run)
    if copy is not None:
        copy.remove()
    run.remove()


def refresh(runs: Path) -> None:
    """Download the journals of all runs in an object store; does nothing for a plain folder.

    Raises Unreachable.
    """
    store = object_store.of(runs)
    if store is None:
        return
    objects: dict[str, Objects] = {}
    for key, stored in store.objects().items():
        experiment, _, rest = key.partition("/")
        name, _, inside = rest.partition("/")
        objects.setdefault(f"{experiment}/{name}", {})[inside] = stored
    for place, there in objects.items():
        run = RunDirectory(runs / place)
        if "run.json" in there and not run.trained_here:
            Mirror(run, store, there).fetch()
    for file in runs.glob("*/*/run.json"):
        run = RunDirectory(file.parent)
        if "run.json" not in objects.get(run.name, {}) and not run.trained_here:
            Mirror(run, store, {}).fetch()  # notes that it was deleted


def _link(folder: Path, names: Iterable[str], target: Path) -> bool:
    """Link files into another folder; False if the file system has no links. Raises FileNotFoundError."""
    try:
        for name in names:
            os.link(folder / name, target / name)
    except FileNotFoundError:
        raise
    except OSError as error:
        log.debug("%s is uploaded without links to its files: %s", folder, error)
        return False
    return True


def _uid(record: bytes) -> str | None:
    """The unique id in a `run.json`; None if it has none or is damaged."""
    try:
        return orjson.loads(record).get("uid")  # type: ignore[no-any-return]
    except (orjson.JSONDecodeError, AttributeError):
        return None


def _is_copied(path: Path) -> bool:
    """Whether a file of a run is uploaded by itself; unfinished files are not."""
    first, *rest = path.parts
    if not rest:
        return first not in _DERIVED and not first.startswith(".")
    return first not in _OWN and not storage.is_unfinished(path)


def _manifest_first(keys: Iterable[str]) -> list[str]:
    """The keys in deletion order: manifests and run.json first, so nothing half deleted seems complete."""
    return sorted(keys, key=lambda key: (not key.endswith(("run.json", MANIFEST)), key))


def _inode(file: Path) -> list[int]:
    """What a file keeps as it grows, and one that replaces it does not have."""
    return [file.stat().st_ino]


def _mark(file: Path) -> list[int]:
    """The size and modification time of a file, by which a change is noticed."""
    known = file.stat()
    return [known.st_size, known.st_mtime_ns]


def _names_in(manifest: bytes) -> list[str]:
    """The files to upload for a manifest: none if it is damaged, none outside the checkpoint's folder."""
    try:
        names = [file["path"] for file in orjson.loads(manifest)["files"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return []
    return [name for name in names if Path(name).name == name]


def _matches(file: Path, known: Listed) -> bool:
    return file.is_file() and file.stat().st_size == known.size and storage.xxh3(file) == known.xxh3
