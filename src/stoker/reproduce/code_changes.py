"""The differences between the code of two runs: files, and lines in them.

A file with the same content under a different name was renamed. Lines are compared with difflib, and
printed like `diff -u`.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stoker import redaction, storage
from stoker.errors import BadInput
from stoker.reproduce import provenance
from stoker.reproduce.code import Code, File, outside_of_git

How = Literal["added", "removed", "changed", "renamed", "other mode"]

_BINARY = 8192  # bytes at the start of a file in which a zero byte marks it as binary, as in git


@dataclass(frozen=True)
class Change:
    """A file that differs between the two."""

    path: str
    how: How
    was: str
    """Its path in the first run, if it was renamed."""
    lines: tuple[str, ...] = ()
    """The unified diff without its first two lines; empty for binary files."""

    @property
    def added(self) -> int:
        """The number of new lines."""
        return sum(line.startswith("+") for line in self.lines)

    @property
    def removed(self) -> int:
        return sum(line.startswith("-") for line in self.lines)


@dataclass(frozen=True)
class CodeChanges:
    """The differences between the code of two runs."""

    before: Code | None
    """None if nothing was recorded."""
    now: Code | None
    files: tuple[Change, ...]
    unknown: str = ""
    """Why the files cannot be compared."""


def compare(before: Path, now: Path) -> CodeChanges:
    """Compare the code in two provenance folders."""
    codes: list[Code | None] = []
    unknown = ""
    for folder in (before, now):
        try:
            codes.append(provenance.read_code(folder))
        except BadInput as error:
            codes.append(None)
            unknown = str(error)
    one, other = codes
    if one is None or other is None or one.files == other.files:
        return CodeChanges(one, other, (), unknown)
    with tempfile.TemporaryDirectory(prefix="stoker-diff-") as scratch:
        roots = Path(scratch, "before"), Path(scratch, "now")
        try:
            for folder, code, root in zip((before, now), (one, other), roots, strict=True):
                _unpack(folder, code, root)
        except BadInput as error:
            return CodeChanges(one, other, (), str(error))
        return CodeChanges(one, other, tuple(_changes(one, other, *roots)))


def changed_since(code: Code) -> list[str]:
    """The files of a run's code that have changed or disappeared at their original place."""
    root = Path(code.root)
    if not root.is_dir():
        return []
    return [file.path for file in _comparable(code) if _sum(root / file.path) != file.xxh3]


def since_begun(folder: Path, source: Path) -> dict[str, str | None]:
    """Like `changed_for`, for the code in a provenance folder; empty if there is none."""
    try:
        return changed_for(provenance.read_code(folder), source)
    except (BadInput, OSError):
        return {}


def changed_for(code: Code, source: Path) -> dict[str, str | None]:
    """The source files that differ from those that a run recorded, for a script that continues it.

    Fast, as it runs at the start of a run: new files are not searched for, but whatever imports them has
    changed.

    Args:
        source: the script that continues the run, possibly in a different copy of the code; or a folder.

    Returns:
        The path of each in the code, with its XXH3; None for one that is gone.
    """
    source = Path(os.path.realpath(source))
    root = _root_of(code, source)
    if root is None:
        return {}
    found: dict[str, str | None] = {}
    for file in _comparable(code):
        if redaction.is_code(file.path) and (now := _sum(root / file.path)) != file.xxh3:
            found[file.path] = now
    if root != Path(code.root):  # a copy may be incomplete
        found = {path: now for path, now in found.items() if now is not None}
    if code.script and source.is_file() and source != root / code.script:
        found[os.path.relpath(source, root)] = _sum(source)
    return found


def differs_from(folder: Path, changes: Mapping[str, str | None], source: Path) -> list[str]:
    """The files of a run's code that this process uses with other content than the process that opened it.

    These are the script, what it imports, and all that is loaded; what else lies in the folder of one of the
    two says nothing.

    Args:
        folder: the provenance folder of the run.
        changes: how the code differed when the run was continued; see `changed_for`.
        source: the script that this process runs, possibly in a different copy of the code; or a folder.
    """
    source = Path(os.path.realpath(source))
    try:
        code = provenance.read_code(folder)
    except (BadInput, OSError):
        return []
    root = _root_of(code, source)
    if root is None:
        return []
    sums = {f.path: changes.get(f.path, f.xxh3) for f in _comparable(code) if redaction.is_code(f.path)}
    used = _used(root, source, {Path(path).name for path in sums})
    return [
        path
        for path, known in sums.items()
        if path in used and known is not None and _sum(root / path) not in (None, known)
    ]


def _used(root: Path, source: Path, names: Set[str]) -> set[str]:
    """The source files with one of these names that this process has loaded or will, relative to a root."""
    loaded = (getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values()))
    files = [Path(os.path.realpath(file)) for file in loaded if file and Path(file).name in names]
    used = {file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)}
    return used | set(outside_of_git(source, root).paths)


def _root_of(code: Code, source: Path) -> Path | None:
    """The root of the code that a script or folder belongs to; None if that is different code."""
    script = Path(code.script or ".").parts
    if script and source.is_file() and source.parts[-len(script) :] == script:
        return source.parents[len(script) - 1]
    return Path(code.root) if source.is_relative_to(code.root) else None


def _comparable(code: Code) -> Iterator[File]:
    """The files whose content is recorded exactly as on disk."""
    redacted = frozenset(code.redacted)
    return (file for file in code.files if file.path not in redacted and file.mode != "120000")


def _sum(file: Path) -> str | None:
    try:
        return storage.xxh3(file)
    except OSError:
        return None


def _unpack(folder: Path, code: Code, target: Path) -> None:
    target.mkdir()
    if code.bundle is not None:
        provenance.extract(folder, target)


def _changes(before: Code, now: Code, old: Path, new: Path) -> list[Change]:
    one, other = {f.path: f for f in before.files}, {f.path: f for f in now.files}
    gone = {path: file for path, file in one.items() if path not in other}
    found = []
    for path, file in other.items():
        was = one.get(path) or next((f for f in gone.values() if f.xxh3 == file.xxh3 and f.bytes > 0), None)
        if was is None:
            found.append(Change(path, "added", path, _lines(None, new / path)))
        elif was.path != path:
            del gone[was.path]
            found.append(Change(path, "renamed", was.path))
        elif (was.xxh3, was.mode) != (file.xxh3, file.mode):
            found.append(_changed(was, file, old, new))
    found += [Change(path, "removed", path, _lines(old / path, None)) for path in gone]
    return sorted(found, key=lambda change: change.path)


def _changed(was: File, file: File, old: Path, new: Path) -> Change:
    if was.xxh3 == file.xxh3:
        return Change(file.path, "other mode", was.path)
    return Change(file.path, "changed", was.path, _lines(old / was.path, new / file.path))


def _lines(old: Path | None, new: Path | None) -> tuple[str, ...]:
    """The unified diff of two files, one of which may not exist; empty if one is binary."""
    texts = [_text(file) if file is not None else [] for file in (old, new)]
    if any(text is None for text in texts):
        return ()
    diff = difflib.unified_diff(texts[0] or [], texts[1] or [], lineterm="")
    return tuple(diff)[2:]


def _text(file: Path) -> list[str] | None:
    if file.is_symlink():
        return [f"-> {file.readlink()}"]
    content = file.read_bytes()
    if b"\0" in content[:_BINARY]:
        return None
    return content.decode(errors="replace").splitlines()
