"""Files that survive a crash: atomic writes, synced directories, checksums and locks.

The one place that knows how a file becomes durable. A file written here is either there
whole or not there at all, whatever was killed when.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import psutil
import xxhash

_PIECE = 2**20  # bytes that are read at once
_LEAST_PIECE = 2**12  # of a small file, for which no more is cleared
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")

# File systems that one machine has to itself.
_OWN_DISKS = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "ramfs",
    "rootfs", "overlay", "squashfs", "erofs", "vfat", "exfat", "ntfs", "ntfs3", "fuseblk", "apfs", "hfs",
})  # fmt: skip


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename is lost in a power cut until this is done."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def said_of_full_disk(error: BaseException) -> str:
    """What a user is told of an error that is a full disk, or a quota that is used up; else nothing."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f"the disk is full ({error}): make room, then run the same command again"


def unfinished(path: Path) -> Path:
    """A name beside a path for what is renamed to it once it is whole; of no other writer."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # containers share pids


def is_unfinished(path: Path) -> bool:
    """Whether a path has a name of `unfinished`, or is below one: it is being written, or a kill left it."""
    return any(_UNFINISHED.fullmatch(part) for part in path.parts)


def write_atomically(path: Path, content: bytes, *, lasts: bool = True, synced: bool = True) -> None:
    """Write a file whole: beside it first, synced, then renamed into place; of several writers one is last.

    Args:
        lasts: wait until a power cut cannot take it any more; it never leaves a part of it.
        synced: else a power cut may leave the file empty, until it is synced by whoever says so.
    """
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if synced or lasts:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if lasts:
        sync_directory(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file whole where there is none: of several writers one does. Raises FileExistsError."""
    whole = unfinished(path)
    try:
        write_atomically(whole, content, lasts=False)
        try:
            os.link(whole, path)
        except FileExistsError:
            raise
        except OSError:  # the file system knows no links: there it may be seen while it is written
            with path.open("xb") as file:
                file.write(content)
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3(path: Path) -> str:
    """The XXH3 checksum (128 bits) of a file's content, in hex: what `xxhsum -H2` prints.

    It finds what a disk or a network gets wrong, as fast as memory is read; not what somebody forges.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:  # not mapped: a page that cannot be read would end the process
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(max(size, _LEAST_PIECE), _PIECE)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def modified(file: Path) -> int:
    """When a file was touched last, in nanoseconds; 0 where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def files_under(path: Path) -> list[Path]:
    """Every file of a folder (or the file itself), sorted by name."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def try_lock(path: Path) -> int | None:
    """Take the lock of a file; None where another process holds it.

    The kernel lets go of it when the holder ends, however it ends, so a lock that is held
    means a process that lives. Returns a descriptor: close it to let go.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _ in range(5):  # `is_locked` holds it for an instant, which is not an owner
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return descriptor
    os.close(descriptor)
    return None


def is_shared(path: Path) -> bool:
    """Whether other machines may reach a path: it is on no file system that is a disk of this one."""
    return _file_system_of(path) not in _OWN_DISKS


def reach_of_locks(path: Path) -> str:
    """A name for where a lock below a path is seen: everywhere in this kernel, through this mount."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        kernel = f"{platform.node()}@{psutil.boot_time():.0f}"
    return f"{kernel}:{existing(path).stat().st_dev}"


def _file_system_of(path: Path) -> str:
    """The kind of file system that a path is in, as the kernel names it; empty where it does not say."""
    inside = existing(path)
    known = (inside.stat().st_dev, _mounts(int(time.monotonic())))
    if known not in _KINDS:
        _KINDS.clear()
        _KINDS[known] = _look_up(inside.resolve())
    return _KINDS[known]


_KINDS: dict[tuple[int, bytes], str] = {}
"""The kind of a device's file system, as long as the same is mounted: to look it up takes a while."""


@functools.lru_cache(1)
def _mounts(second: int) -> bytes:
    """What is mounted where, as the kernel says it in a second of the clock; while it says the same, nothing
    has changed."""
    try:
        return Path("/proc/self/mounts").read_bytes()
    except OSError:
        return b""


def _look_up(path: Path) -> str:
    inside = f"{path}/"
    mounts = [
        m for m in psutil.disk_partitions(all=True) if inside.startswith(f"{m.mountpoint.rstrip('/')}/")
    ]
    mounts.sort(key=lambda mount: len(mount.mountpoint))  # of two at one place the last covers
    return mounts[-1].fstype if mounts else ""


def existing(path: Path) -> Path:
    """The path itself, or the folder nearest above it that there is."""
    return next(p for p in (path, *path.parents) if p.exists())


def release_in_children(descriptor: int) -> None:
    """Close a lock's descriptor in children made by `fork`, which would keep the lock past our death."""
    _LOCKS[descriptor] = os.fstat(descriptor).st_ino


def held_here(path: Path) -> bool:
    """Whether this very process holds the lock of a file, which it has said to `release_in_children`."""
    for descriptor in _LOCKS:
        with contextlib.suppress(OSError):  # it was closed since
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
    return False


def _release_locks() -> None:
    for descriptor, identity in _LOCKS.items():
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == identity:  # the number may stand for another file by now
                os.close(descriptor)
    _LOCKS.clear()


_LOCKS: dict[int, int] = {}
"""Descriptors of locks, and the file that each stood for."""
os.register_at_fork(after_in_child=_release_locks)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Let a file stand at another place too: linked, or copied where a link to there cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(path: Path, timeout: float = 600.0) -> Iterator[None]:
    """Hold the lock of a file, waiting for it up to `timeout` seconds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} stayed locked for {timeout:.0f} s")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)


def remembered(file: Path, about: Mapping[str, Any]) -> Any:
    """What `remember` was told of the same; None where it was not."""
    return read_json(file).get(_key(about))


def remember(file: Path, about: Mapping[str, Any], value: Any) -> None:
    """Keep a value of JSON's types by all that it depends on, in a file of such."""
    write_json(file, {**read_json(file), _key(about): value})


def _key(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of small things that can be found out again; empty where it cannot be read."""
    try:
        found = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write what `read_json` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, orjson.dumps(content))


def try_to_write_json(file: Path, content: dict[str, Any]) -> None:
    """Write what can be found out again; that there is no room for it, or no right, is no matter."""
    with contextlib.suppress(OSError):
        write_json(file, content)


def cache_folder() -> Path:
    """Where what can be made again is kept: STOKER_CACHE, else `stoker` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("STOKER_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoker"
