"""Where runs and caches are stored: whether they are writable, how much space is left, whether locks work.

Tests are made in a separate folder, or under a separate key, which is removed again.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from stoker import storage, store_urls, words
from stoker.doctor.findings import Finding, note, ok, problem, said
from stoker.errors import BadInput, StokerError
from stoker.object_store import Store

_PREFIX = ".stoker-doctor-"
_LEAST, _ENOUGH = 2**30, 10 * 2**30  # bytes free
_WRITTEN = b"\0" * 2**20  # enough for an exhausted quota to refuse it
_SYNCS = 5
_SLOW = 0.1  # seconds until a small file is on disk
_NO_LOCKS = (
    "mount the file system with locks (Lustre: -o flock; NFS: without nolock), or set --runs to a different "
    "folder or to s3://bucket/folder"
)
_OTHER_RUNS = "set --runs, or STOKER_RUNS, to a writable folder"


def runs(place: str) -> Iterator[Finding]:
    """The folder for runs, which is not created; or that of an object store."""
    if store_urls.is_url(place):
        yield from _stored(place)
        return
    path = Path(place).absolute()
    try:
        with _tried(path) as folder:
            (folder / "written").write_bytes(_WRITTEN)
            held, seconds = _lock(folder / "lock"), _sync(folder / "synced")
    except OSError as error:
        yield problem(_refused(path, error, _OTHER_RUNS))
        return
    if held:
        yield problem(f"locks do not work in {path} ({held}), so two jobs could train one run: {_NO_LOCKS}")
    where = "on a shared file system" if storage.is_shared(path) else "on a local disk"
    yield _with_room(
        path, f"{path} is writable, {where}{'' if held else ', locks work'}", "use a different --runs"
    )
    slow = f"a small file is on disk after {1000 * seconds:.3g} ms"
    if seconds > _SLOW:
        yield note(f"{slow}: logging and checkpoints wait for this; put --runs on a faster disk")
    else:
        yield ok(slow)


def others() -> Iterator[Finding]:
    """Other places that are written: the hub's cache, stoker's cache, temporary files."""
    from huggingface_hub import constants

    hub, own = Path(constants.HF_HUB_CACHE).absolute(), storage.cache_folder().absolute()
    places = (
        (hub, "the hub's cache", "set HF_HOME to a {}folder"),
        (own, "stoker's cache", "set STOKER_CACHE to a {}folder"),
        (_temporary(), "temporary files", "set TMPDIR to a {}folder"),
    )
    for path, what, hint in places:
        try:
            with _tried(path) as folder:
                (folder / "written").write_bytes(_WRITTEN)
        except OSError as error:
            yield problem(f"{what}: {_refused(path, error, hint.format('writable '))}")
        else:
            yield _with_room(path, f"{what}: {path} is writable", hint.format("different "))


def _temporary() -> Path:
    """The folder for temporary files. Python uses a different one if this is not writable."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir()).absolute()


@contextlib.contextmanager
def _tried(path: Path) -> Iterator[Path]:
    """A new folder inside one, or inside the closest existing parent. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=storage.existing(path)) as folder:
        yield Path(folder)


def _refused(path: Path, error: OSError, hint: str) -> str:
    above = storage.existing(path)
    where = "" if above == path else f", of {above}"
    return f"{path} is not writable ({error.strerror or said(error)}{where}): {hint}"


def _with_room(path: Path, text: str, hint: str) -> Finding:
    free = psutil.disk_usage(str(storage.existing(path))).free
    text = f"{text}, {words.size(free)} free"
    if free < _LEAST:
        return problem(f"{text}, too little for a checkpoint or a model: free space there, or {hint}")
    return note(f"{text}, which a few checkpoints can fill") if free < _ENOUGH else ok(text)


def _lock(file: Path) -> str:
    """Why locking a file does not work; empty if it does."""
    try:
        descriptor = storage.try_lock(file)
        if descriptor is None:
            return "the lock of a new file is already taken"
        held = storage.is_locked(file)
        os.close(descriptor)
        if not held:
            return "a second lock was granted"
        return "a released lock stays locked" if storage.is_locked(file) else ""
    except OSError as error:
        return error.strerror or said(error)


def _sync(file: Path) -> float:
    """Seconds until a small file is on disk, the median of a few."""
    seconds = []
    for _ in range(_SYNCS):
        begun = time.perf_counter()
        storage.write_atomically(file, b"synced")
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _stored(url: str) -> Iterator[Finding]:
    """A folder of an object store, tested by writing, reading, listing and removing an object."""
    folder = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        store_urls.check(url)
        store, begun = Store(url.rstrip("/"), "", patience=0.0), time.perf_counter()
        try:
            yield from _used(store, folder, begun)
        finally:
            with contextlib.suppress(StokerError):
                store.remove(f"{folder}/object")
    except FileNotFoundError:
        yield problem(f"{url}: the bucket does not exist: create it, or correct --runs")
    except BadInput as error:
        yield problem(said(error))
    except StokerError as error:
        told = said(error).replace(f"/{folder}/object", "").replace(f"/{folder}", "")
        server = ", AWS_ENDPOINT_URL" if url.startswith("s3") else ""
        yield problem(f"{told}: check the network{server} and the credentials, or correct --runs")


def _used(store: Store, folder: str, begun: float) -> Iterator[Finding]:
    key, content = f"{folder}/object", uuid.uuid4().bytes
    store.write(key, content, new=True)
    if store.read(key) != content or list(store.objects(folder)) != [key]:
        yield problem(f"{store.url} does not return what was just written: runs need a consistent store")
        return
    try:
        store.write(key, content, new=True)
    except FileExistsError:
        pass
    else:
        yield problem(
            f"{store.url} lets a second writer overwrite a new object, so two machines could train one run: "
            "use a store with conditional writes (If-None-Match), or train each run on one machine only"
        )
    store.remove(key)
    if store.objects(folder):
        yield problem(f"{store.url} does not delete objects: allow the credentials to delete there too")
        return
    yield ok(f"{store.url}: write, list, read and delete work ({time.perf_counter() - begun:.2g} s)")
