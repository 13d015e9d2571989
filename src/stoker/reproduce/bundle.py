"""The bundle: the files of a run's code as one archive that any tar can unpack.

The same files give the same bytes, so one archive is made and kept for all runs with the same state of the
code: it is in the artifact store under the checksum of its list of files, and runs link to it.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import xxhash
from stoker import redaction, storage
from stoker.errors import BadInput
from stoker.reproduce import scanned
from stoker.reproduce.code import Code, CodeOnDisk, File, LeftOut

NAME = "code.tar.gz"
_REMEMBERED = 256  # intact archives, remembered in the cache folder
MOST_OF_A_FILE = 2**20
"""Bytes: a larger file is data, or a build product."""
MOST_IN_ALL = 64 * 2**20
"""Bytes of all files together, uncompressed."""

_LEVEL = 1  # zlib's fastest: source code shrinks to a third of its size
_LINK = "120000"


@dataclass(frozen=True)
class _Read:
    """A file and its content in the bundle."""

    file: File
    data: bytes
    is_redacted: bool


@dataclass(frozen=True)
class _Scan:
    """What is known about contents, and what is newly found out."""

    clean: frozenset[bytes]
    """See `scanned`."""
    values: list[str]
    """Values that are secret wherever they occur."""
    fresh: set[bytes] = field(default_factory=set)


def read(found: CodeOnDisk) -> tuple[Code, Mapping[str, bytes]]:
    """The code with its list of files, and their contents without secrets."""
    root = Path(found.code.root)
    private = frozenset(filter(redaction.is_secret_file, found.code.untracked))
    chosen, unfit = _choose(root, found.paths, private)
    scan = _Scan(scanned.known(), redaction.values())
    taken = [_read(root, path, scan) for path in chosen]
    scanned.remember(scan.clean, scan.fresh)
    kept = [one for one in taken if isinstance(one, _Read)]
    unfit += [one for one in taken if isinstance(one, LeftOut)]
    code = dataclasses.replace(
        found.code,
        files=tuple(one.file for one in kept),
        left_out=(*found.unread, *sorted(unfit, key=lambda left: left.path)),
        redacted=tuple(one.file.path for one in kept if one.is_redacted),
    )
    return code, {one.file.path: one.data for one in kept}


def pack(target: Path, files: Sequence[File], contents: Mapping[str, bytes], store: Path) -> str:
    """Put the archive of the files at a path, reusing the one in the store if it exists; returns its XXH3.

    Args:
        store: a folder of `xx/NAME` files that runs share. Raises OSError.
    """
    listed = orjson.dumps([[file.path, file.xxh3, file.mode] for file in files])
    digest = xxhash.xxh3_128_hexdigest(listed)
    kept = store / digest[:2] / f"code-{digest}.tar.gz"
    found = storage.xxh3(kept) if kept.is_file() else ""
    seen = storage.cache_folder() / "bundles.json"
    whole = storage.read_json(seen)
    if not found or found != whole.get(digest):  # runs link to it, so damage to one damages all
        if not found or _wrong(kept, files):
            _put(kept, _archive(files, contents))
            found = storage.xxh3(kept)
        newest = list(whole.items())[-_REMEMBERED:]
        storage.try_to_write_json(seen, {**dict(newest), digest: found})
    target.unlink(missing_ok=True)
    storage.link_or_copy(kept, target)
    return found


def _put(kept: Path, content: bytes) -> None:
    """Write an archive of the store, atomically."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = storage.unfinished(kept.parent.parent / "content")
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o444)
        storage.sync_file(temporary)
        temporary.replace(kept)
    finally:
        temporary.unlink(missing_ok=True)


def unpack(archive: Path, target: Path, xxh3: str, files: Sequence[File]) -> None:
    """Unpack an archive into a folder, writing nothing outside it.

    Args:
        archive, target: the archive, and the folder, which is created if needed.
        xxh3: the recorded checksum of the archive.
        files: its recorded contents.

    Raises:
        BadInput: the archive does not exist, its checksum or that of a file in it differs, or something
            points outside the folder.
    """
    try:
        found = storage.xxh3(archive)
    except OSError as error:
        raise BadInput(f"the code of the run cannot be read: {archive}: {error.strerror}") from error
    if found != xxh3:
        raise BadInput(
            f"{archive} is damaged: its XXH3 is {found}, but {xxh3} was recorded; restore it from an intact "
            "copy of the run, or use the commit that code.json names"
        )
    if wrong := _wrong(archive, files):
        raise BadInput(
            f"{archive} was already damaged when it was recorded: {wrong[0]} in it is not the file that "
            "code.json lists; copy it from a run of the same code, or use the commit that code.json names"
        )
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                _unpack_member(members, member, target.resolve())
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{archive} cannot be unpacked into {target}: {error}") from error


def _wrong(archive: Path, files: Sequence[File]) -> list[str]:
    """Files that differ, are missing or are extra in an archive; its own name if it cannot be read."""
    expected = {file.path: file.xxh3 for file in files}
    try:
        with tarfile.open(archive, "r:gz") as members:
            found = {member.name: xxhash.xxh3_128_hexdigest(_content(members, member)) for member in members}
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return [archive.name]
    return sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))


def _content(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The contents of a file, or the target of a link."""
    if member.issym():
        return os.fsencode(member.linkname)
    file = members.extractfile(member)
    return file.read() if file is not None else b""


def _unpack_member(members: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    """Write a file or a symbolic link. Raises TarError if it points outside the folder.

    tarfile's own filter for this came with Python 3.11.4.
    """
    place = root / member.name
    leads_to = place.parent / member.linkname if member.issym() else place
    inside = [Path(os.path.normpath(path)) for path in (place, leads_to)] + [place.parent.resolve()]
    if not all(path.is_relative_to(root) for path in inside):
        raise tarfile.TarError(f"{member.name} points outside the archive")
    place.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        place.symlink_to(member.linkname)
    elif member.isfile():
        place.write_bytes(_content(members, member))
        place.chmod(member.mode & 0o755)


def _choose(root: Path, paths: Sequence[str], private: Set[str]) -> tuple[list[str], list[LeftOut]]:
    """The files that fit, preferring small ones if not all do; and those that do not fit."""
    sizes: dict[str, int] = {}
    left_out = []
    for path in paths:
        try:
            status = (root / path).lstat()
        except OSError:
            if "\ufffd" in path:  # from `machine.output`
                left_out.append(LeftOut(path, None, "its name is not UTF-8"))
            continue  # otherwise it was deleted without telling git
        if stat.S_ISLNK(status.st_mode) or stat.S_ISREG(status.st_mode):
            sizes[path] = status.st_size
    total, fitting = 0, set()
    for path, size in sorted(sizes.items(), key=lambda item: item[1]):
        if path in private:
            left_out.append(LeftOut(path, size, "not in git, and its name suggests secrets"))
        elif size > MOST_OF_A_FILE:
            left_out.append(LeftOut(path, size, "larger than 1 MiB"))
        elif total + size > MOST_IN_ALL:
            left_out.append(LeftOut(path, size, "over the total limit of 64 MiB"))
        else:
            total += size
            fitting.add(path)
    return [path for path in sizes if path in fitting], left_out


def _read(root: Path, path: str, scan: _Scan) -> _Read | LeftOut:
    """A file's content without secrets, or why it is not included."""
    place = root / path
    try:
        mode = place.lstat().st_mode
        if stat.S_ISLNK(mode):
            return _read_link(root, path)
        data = place.read_bytes()
    except OSError as error:
        return LeftOut(path, _size(place), f"cannot be read: {error.strerror}")
    kept = _without_secrets(path, data, scan)
    if kept is None:
        return LeftOut(path, len(data), "not text, and contains a secret")
    permissions = "100755" if mode & stat.S_IXUSR else "100644"
    file = File(path, len(kept), xxhash.xxh3_128_hexdigest(kept), permissions)
    return _Read(file, kept, kept is not data)


def _without_secrets(path: str, data: bytes, scan: _Scan) -> bytes | None:
    """See `redaction.content`; contents that an earlier start scanned are not scanned again."""
    digest = scanned.digest(path, data)
    if digest in scan.clean and not redaction.holds(data, scan.values):
        return data
    kept = redaction.content(path, data)
    if kept is data:
        scan.fresh.add(digest)
    return kept


def _read_link(root: Path, path: str) -> _Read | LeftOut:
    leads = os.readlink(root / path)  # noqa: PTH115 - as it is written
    resolved = Path(os.path.realpath(root / path))
    if Path(leads).is_absolute() or not resolved.is_relative_to(root):
        return LeftOut(path, _size(resolved), f"a link out of {root.name} to {redaction.text(leads)}")
    data = os.fsencode(leads)
    return _Read(File(path, len(data), xxhash.xxh3_128_hexdigest(data), _LINK), data, is_redacted=False)


def _size(file: Path) -> int | None:
    """The size in bytes; None if it is not a file, or does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _archive(files: Sequence[File], contents: Mapping[str, bytes]) -> bytes:
    """A gzipped tar that does not depend on when, where or by whom it was made."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", _LEVEL, packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as members,
    ):
        for file in files:
            data = contents[file.path]
            member = tarfile.TarInfo(file.path)
            member.mode = int(file.mode[-3:], 8) or 0o777
            if file.mode == _LINK:
                member.type, member.linkname = tarfile.SYMTYPE, os.fsdecode(data)
                members.addfile(member)
            else:
                member.size = len(data)
                members.addfile(member, io.BytesIO(data))
    return packed.getvalue()
