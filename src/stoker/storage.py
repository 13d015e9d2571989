"""Files that survive a crash: atomic writes, synced directories, checksums and locks.

All knowledge of how a file becomes durable is in this module. A file written here is either complete or
absent, whenever a process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import psutil
import xxhash

_PIECE = 2**20  # bytes read at once
_LEAST_PIECE = 2**12  # the same for a small file, to avoid allocating a large buffer
_OF_SYSTEM = re.compile(r"OSError: \[Errno (\d+)\]")
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_ABANDONED = 86_400.0  # seconds after which nobody is still making what is unfinished
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")

# File systems that are local to one machine.
_OWN_DISKS = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "ramfs",
    "rootfs", "overlay", "squashfs", "erofs", "vfat", "exfat", "ntfs", "ntfs3", "fuseblk", "apfs", "hfs",
})  # fmt: skip


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: until then, a power cut can undo a rename."""
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


def permit_as_folder(path: Path) -> None:
    """Let whoever may read its folder read a safetensors file, or all in a folder: they are made with 600.

    The folder's permissions are those of the umask; where everybody may write, as in /tmp, others may not.
    """
    for file in path.rglob("*.safetensors") if path.is_dir() else (path,):
        file.chmod(file.parent.stat().st_mode & 0o664)


def said_of_full_disk(error: BaseException) -> str:
    """A message for the user if the error is a full disk or an exhausted quota; otherwise empty."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f"the disk is full ({error}): make room, then run the same command again"


def says_disk_failed(error: str) -> bool:
    """Whether the text of an error, as a run records it, is of a full, read-only or broken disk."""
    found = _OF_SYSTEM.match(error)
    return found is not None and int(found[1]) in _OF_DISK


def unfinished(path: Path) -> Path:
    """A unique temporary path beside `path`, to be renamed to it when the file is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # pids repeat across containers


def is_unfinished(path: Path) -> bool:
    """Whether a path is, or is below, one made by `unfinished`: still being written, or left by a kill."""
    return any(_UNFINISHED.fullmatch(part) for part in path.parts)


def write_atomically(path: Path, content: bytes, *, lasts: bool = True, synced: bool = True) -> None:
    """Write a file atomically: to a temporary file that is then renamed. With several writers, the last wins.

    Args:
        lasts: wait until the file is durable. Without it, a power cut may lose the file, but not part of it.
        synced: sync the content before the rename. If neither this nor `lasts` is set, the caller must sync
            the file: until then, a power cut may leave it empty.
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
    """Create a file atomically. With several writers, one succeeds; the others raise FileExistsError."""
    whole = unfinished(path)
    try:
        write_atomically(whole, content, lasts=False)
        try:
            os.link(whole, path)
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links: others may see the file while it is written
            with path.open("xb") as file:
                file.write(content)
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()


@contextlib.contextmanager
def new(target: Path) -> Iterator[Path]:
    """A temporary path for a new folder or file, which becomes `target` at the end of the block.

    If the block fails, what it made is removed. Of the processes that see each other's locks only one at a
    time may make the same target; what one left that was killed is removed first. Others have paths of their
    own. If one of those made the target meanwhile, that one stays.
    """
    mark = hashlib.sha256(reach_of_locks(target).encode()).hexdigest()[:12]
    temporary = target.with_name(f".{target.name}.{mark}.tmp")
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if left == temporary or (is_unfinished(left) and time.time() - left.lstat().st_mtime > _ABANDONED):
            _remove(left)
    try:
        yield temporary
        _publish(temporary, target)
    except BaseException:
        _remove(temporary)
        raise
    sync_directory(target.parent)


def _publish(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        _remove(made)


def _remove(path: Path) -> None:
    """Remove a folder or a file, if it exists, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3(path: Path) -> str:
    """The 128-bit XXH3 checksum of a file's content, in hex, as `xxhsum -H2` prints it.

    It detects errors of disks and networks at about the speed of memory, but not deliberate changes.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:  # not mmap: an unreadable page would kill the process
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(max(size, _LEAST_PIECE), _PIECE)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def modified(file: Path) -> int:
    """A file's modification time in nanoseconds; 0 if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def files_under(path: Path) -> list[Path]:
    """All files in a folder and its subfolders, also linked ones, sorted; for a file, the file itself."""
    if path.is_file():
        return [path]
    return sorted(Path(entry.path) for entry in walk(path) if entry.is_file())


def walk(folder: Path, is_skipped: Callable[[str], bool] = lambda name: False) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder but folders, in the order of names. Links are followed, but not in circles.

    Args:
        is_skipped: whether a file or a folder is passed over, by its name.

    Raises:
        OSError: a folder cannot be read.
    """
    return _walk(str(folder), is_skipped, frozenset(map(str, folder.resolve().parents)))


def _walk(
    folder: str, is_skipped: Callable[[str], bool], above: frozenset[str]
) -> Iterator[os.DirEntry[str]]:
    """Args: above: the folders that contain this one, to which a link may lead back."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not is_skipped(e.name)), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, is_skipped, above | {real})
        else:
            yield entry


def try_lock(path: Path) -> int | None:
    """Take the lock of a file; None if another process holds it.

    The kernel releases the lock when its holder ends for whatever reason, so a held lock means a living
    process. Returns a descriptor; closing it releases the lock.
    """
    for _ in range(5):  # `is_locked` takes the lock for an instant, without owning it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            time.sleep(0.01)
            continue
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # it was deleted meanwhile, and the lock of a deleted file is nobody's
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that is at a path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_shared(path: Path) -> bool:
    """Whether other machines may see a path: its file system is not known to be local."""
    return _file_system_of(path) not in _OWN_DISKS


def reach_of_locks(path: Path) -> str:
    """Identifies the processes that see a lock below a path: those under this kernel, on this device."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        kernel = f"{platform.node()}@{psutil.boot_time():.0f}"
    return f"{kernel}:{existing(path).stat().st_dev}"


def _file_system_of(path: Path) -> str:
    """The type of the file system of a path, as the kernel names it; empty if unknown."""
    inside = existing(path)
    known = (inside.stat().st_dev, _mounts(int(time.monotonic())))
    if known not in _KINDS:
        _KINDS.clear()
        _KINDS[known] = _look_up(inside.resolve())
    return _KINDS[known]


_KINDS: dict[tuple[int, bytes], str] = {}
"""Caches the file system type of a device until the mounts change, because the lookup is slow."""


@functools.lru_cache(1)
def _mounts(second: int) -> bytes:
    """The kernel's list of mounts, read at most once per second."""
    try:
        return Path("/proc/self/mounts").read_bytes()
    except OSError:
        return b""


def _look_up(path: Path) -> str:
    inside = f"{path}/"
    mounts = [
        m for m in psutil.disk_partitions(all=True) if inside.startswith(f"{m.mountpoint.rstrip('/')}/")
    ]
    mounts.sort(key=lambda mount: len(mount.mountpoint))  # a later mount at the same place hides earlier ones
    return mounts[-1].fstype if mounts else ""


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def release_in_children(descriptor: int) -> None:
    """Close a lock's descriptor in forked children, which could otherwise keep it after this process."""
    _LOCKS[descriptor] = os.fstat(descriptor).st_ino


def held_here(path: Path) -> bool:
    """Whether this process holds the lock of a file, if it was passed to `release_in_children`."""
    for descriptor in _LOCKS:
        with contextlib.suppress(OSError):  # the descriptor was closed
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
    return False


def _release_locks() -> None:
    for descriptor, identity in _LOCKS.items():
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == identity:  # the number may have been reused for another file
                os.close(descriptor)
    _LOCKS.clear()


_LOCKS: dict[int, int] = {}
"""Descriptors of locks, with the inode of each file."""
os.register_at_fork(after_in_child=_release_locks)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Hard-link a file, or copy it if it cannot be linked."""
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
    """The value that `remember` stored for `about`; None if there is none."""
    return read_json(file).get(_key(about))


def remember(file: Path, about: Mapping[str, Any], value: Any) -> None:
    """Store a JSON value in a file, under everything that it depends on."""
    write_json(file, {**read_json(file), _key(about): value})


def _key(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file cannot be read, or holds something else."""
    try:
        found = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object that `read_json` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, orjson.dumps(content))


def try_to_write_json(file: Path, content: dict[str, Any]) -> None:
    """Like `write_json`, but ignores errors such as a full disk or missing permissions."""
    with contextlib.suppress(OSError):
        write_json(file, content)


def cache_folder() -> Path:
    """The folder for data that can be recreated: STOKER_CACHE, or `stoker` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("STOKER_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoker"
