"""The copy of a run in an object store, where its runs folder is one.

A run is trained in the working copy on this machine, and brought to the store from there
(`run/uploader.py`). A checkpoint's manifest goes last, and the journal goes before it, so what is in the
store is a run that can be continued at any instant. Journal files only grow, and go there in stretches
(`run/stretches.py`). What the sinks keep is not brought there: they begin anew from the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
from stoker import object_store, storage
from stoker.errors import StokerError
from stoker.object_store import Store, Stored
from stoker.run import lease, stretches, view
from stoker.run.directory import MANIFEST, RunDirectory
from stoker.run.stretches import Stretch

log = logging.getLogger("stoker")

Objects = dict[str, Stored]

_KNOWN = "store.known"
_LISTINGS = 5  # of a run that changes meanwhile
_OWN = (  # folders that are not copied file by file
    "sinks", "tensorboard", "wandb", "checkpoints", "journal", "lease", "again"
)  # fmt: skip
_DERIVED = (  # files beside run.json that are of this machine
    "attempt.lock", "compacted.safetensors", "store.json", "store.lock", "store.wake", _KNOWN
)  # fmt: skip


class Lost(StokerError):
    """The run is another machine's now: what is here is not brought to the store any more."""


class Mirror:
    """A run here and in a store."""

    def __init__(self, run: RunDirectory, store: Store, there: Objects | None = None) -> None:
        self._run, self._store = run, store
        self._key = f"{run.experiment}/{run.id}"
        self._known: dict[str, list[Any]] = storage.read_json(run.path / _KNOWN)
        """Of files that are the same here and there: their size and time here, and their tag there."""
        self._there = there
        """The objects of the run, by key below it; None where that is not known."""

    @property
    def where(self) -> str:
        return f"{self._store.url}/{self._key}"

    # -- from the store --------------------------------------------------------------------

    def fetch(self, *, artifacts: bool = False, newer_there: bool | None = None) -> None:
        """Bring here what another machine made: the journal, and of each checkpoint its manifest.

        Args:
            artifacts: what the run made and logged as well.
            newer_there: whether another machine has trained it since; by default by its lease.
        """
        for left in reversed(range(_LISTINGS)):
            there = self._objects()
            if "run.json" not in there:
                return
            self._run.make_folders()
            if newer_there is None:
                newer_there = self._taken_elsewhere()
            try:
                self._fetch(there, artifacts=artifacts, newer_there=newer_there)
            except FileNotFoundError:  # whoever trains the run joined or removed what was listed
                if not left:
                    raise
            else:
                return

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
        """Bring here the files that are lacking, and those that are others there."""
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

    def fetch_checkpoint(self, path: Path) -> None:
        """Bring here those files of a checkpoint that do not match its manifest. Raises Unreachable."""
        key = f"{self._key}/checkpoints/{path.name}"
        manifest = path / MANIFEST
        try:
            self._store.get(f"{key}/{MANIFEST}", manifest)
            for file in _files_of(manifest.read_bytes()):
                local = path / file["path"]
                if not _matches(local, file):
                    log.info("downloading %s of %s from %s", file["path"], path.name, self._store.url)
                    self._store.get(f"{key}/{file['path']}", local)
        except FileNotFoundError:
            log.debug("%s has no whole %s", self.where, path.name)

    def _void_journals(self, there: Objects) -> None:
        """Leave out what attempts here wrote that another machine, which went on, knew nothing of.

        An attempt of that machine may have the same number. Their files are kept, under another name; sinks
        begin anew, whose ledgers say how far they have read in a file of that name.
        """
        known = stretches.known("journal", there)
        for file in self._run.journal.glob("attempt-*.jsonl"):
            first = known.get(file.name, [])[:1]
            content = b"".join(stretches.read(self._store, f"{self._key}/journal", file.name, first, 0))
            with file.open("rb") as source:
                same = bool(content) and content.startswith(source.read(len(content)))
            if not same:
                log.warning("%s was written here and is void: another machine resumed without it", file.name)
                for derived in (*self._run.sinks.glob("*.json"), self._run.compacted):
                    derived.unlink(missing_ok=True)
                file.replace(file.with_suffix(f".void-{uuid.uuid4().hex[:8]}"))

    def _fetch_manifests(self, there: Objects) -> None:
        """Have the checkpoints that the run has now, where another machine went on with it.

        What was made here after the one that it went on from is of a past that is void.
        """
        stand = {f"step-{step:08d}" for step in view.fold(self._run, self._run.record()).checkpoints}
        known = self._checkpoints(there)
        for manifest in self._run.checkpoints.glob(f"*/{MANIFEST}"):
            folder = manifest.parent.name
            if folder not in known and folder not in stand:
                log.warning("%s was made here and is void: another machine resumed from before it", folder)
                manifest.unlink()
        for folder in known:
            local = self._run.checkpoints / folder / MANIFEST
            try:
                content = self._store.read(f"{self._key}/checkpoints/{folder}/{MANIFEST}")
            except FileNotFoundError:  # whoever trains the run has newer ones, and removed it since
                continue
            if not local.is_file() or local.read_bytes() != content:
                local.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomically(local, content)

    def _taken_elsewhere(self) -> bool:
        """Whether another machine has trained the run since this one did."""
        held = lease.of(self._run.path, self._store.patience)
        return held is not None and not held.standing_here()

    def _fetch_lease(self, there: Objects) -> None:
        """The newest lease, which says who trains the run."""
        folder = self._run.path / lease.FOLDER
        for old in folder.glob("[0-9]*"):
            old.unlink()
        newest = max((key for key in there if key.startswith("lease/")), default=None)
        if newest is not None:
            with contextlib.suppress(FileNotFoundError):
                self._store.get(f"{self._key}/{newest}", self._run.path / newest)

    def _fetch_journal(self, file: Path, there: list[Stretch]) -> None:
        """Append to a journal file what was written of it elsewhere."""
        here = file.stat().st_size if file.is_file() else 0
        if not any(stretch.end > here for stretch in there):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as target:
            for content in stretches.read(self._store, f"{self._key}/journal", file.name, there, here):
                target.write(content)

    # -- to the store ----------------------------------------------------------------------

    def push(self) -> None:
        """Bring to the store what is new here. Raises Unreachable; Lost where the run is another's now."""
        manifests = self._run.checkpoints.glob(f"*/{MANIFEST}")
        committed = sorted((file.parent for file in manifests), reverse=True)
        self._still_ours()
        there = self._objects()
        for file in self._files():
            self._push_file(file, there)
        self._remember()
        known = stretches.known("journal", there)
        for file in sorted(self._run.journal.glob("*.jsonl")):
            stretches.push(self._store, self._key, "journal", file, known.get(file.name, []), there)
        for path in committed:
            self._push_checkpoint(path, there)
        if committed:
            self._still_ours()
            self._remove_others({path.name for path in committed}, there)

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint in the store, as far as is known here."""
        found = self._checkpoints(self._there or {})
        return int(found[-1].removeprefix("step-")) if found else None

    def _still_ours(self) -> None:
        held = lease.of(self._run.path, self._store.patience)
        if held is not None and not held.standing_here():
            raise Lost(f"another machine is training {self.where} now")

    def _files(self) -> Iterator[Path]:
        """What is copied file by file: small things, and what the run made."""
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
        """Bring a checkpoint to the store, its manifest last."""
        key = f"checkpoints/{path.name}"
        with contextlib.suppress(FileNotFoundError):  # it made room for newer ones meanwhile
            mark = _mark(path / MANIFEST)
            manifest = (path / MANIFEST).read_bytes()
            if f"{key}/{MANIFEST}" in there:
                sent = self._known.get(key, [])[:2] == mark
                if sent or self._store.read(f"{self._key}/{key}/{MANIFEST}") == manifest:
                    self._known[key] = [*mark, ""]
                    return
                self._remove(f"{key}/{MANIFEST}", there)  # of another attempt at this step
            for name in (file["path"] for file in _files_of(manifest)):
                self._store.put(f"{self._key}/{key}/{name}", path / name)
                there[f"{key}/{name}"] = Stored((path / name).stat().st_size)
            self._still_ours()
            self._store.write(f"{self._key}/{key}/{MANIFEST}", manifest)
            there[f"{key}/{MANIFEST}"] = Stored(len(manifest))
            self._known[key] = [*mark, ""]

    def _remove_others(self, kept: set[str], there: Objects) -> None:
        """Delete from the store the checkpoints that are none here any more."""
        for folder in {key.split("/")[1] for key in there if key.startswith("checkpoints/")}:
            if folder not in kept and not (self._run.checkpoints / folder / MANIFEST).exists():
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
        """Keep what is known to be the same here and there, for those who look next."""
        if self._known != storage.read_json(self._run.path / _KNOWN):
            storage.write_json(self._run.path / _KNOWN, self._known)

    def forget(self) -> None:
        """Look again at what is in the store: a request may have been done though it seemed to fail."""
        self._there = None

    def _checkpoints(self, there: Objects) -> list[str]:
        """The folders of checkpoints that have a manifest in the store, by step."""
        return sorted(k.split("/")[1] for k in there if k.startswith("checkpoints/") and k.endswith(MANIFEST))


def of(run: RunDirectory, patience: float | None = None) -> Mirror | None:
    """A run's copy in the object store that its runs folder is a working copy of; None where it is none.

    Args:
        patience: seconds that a request is tried for; by default as `Store` has it.
    """
    store = object_store.of(run.path.parent.parent)
    if store is not None and patience is not None:
        store = dataclasses.replace(store, patience=patience)
    return Mirror(run, store) if store is not None else None


def remove(run: RunDirectory) -> None:
    """Delete a run, here and in its object store. Raises Unreachable."""
    copy = of(run)
    if copy is not None:
        copy.remove()
    run.remove()


def refresh(runs: Path) -> None:
    """Bring the journals of all runs of an object store here; does nothing for a plain folder.

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


def _is_copied(path: Path) -> bool:
    """Whether a file of a run is copied by itself: what it made may have any name, but not be on its way."""
    first, *rest = path.parts
    if not rest:
        return first not in _DERIVED and not first.startswith(".")
    return first not in _OWN and not storage.is_unfinished(path)


def _manifest_first(keys: Iterable[str]) -> list[str]:
    """In the order in which they are deleted: what is half gone is to be none."""
    return sorted(keys, key=lambda key: (not key.endswith(("run.json", MANIFEST)), key))


def _mark(file: Path) -> list[int]:
    """What changes of a file when it is written: its size and its time."""
    known = file.stat()
    return [known.st_size, known.st_mtime_ns]


def _files_of(manifest: bytes) -> list[dict[str, Any]]:
    """The files that a manifest lists; those of a name that would be elsewhere are of no checkpoint."""
    files: list[dict[str, Any]] = orjson.loads(manifest)["files"]
    return [file for file in files if Path(file["path"]).name == file["path"]]


def _matches(file: Path, known: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == known["size"] and storage.xxh3(file) == known["xxh3"]
