"""What a run read besides its code: found again, checked, and put where the run expects it.

Data and other inputs that the config names by a path relative to the working directory, and files of the
code that the record left out, are linked into the unpacked code from their original place; data also, if the
project was moved, from where the command is given. What the run itself may have written is not linked.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.errors import BadInput
from stoker.reproduce import data
from stoker.reproduce.code import Code
from stoker.reproduce.place import Place
from stoker.words import counted


@dataclass(frozen=True)
class Input:
    """A dataset of a run, as it is found now."""

    name: str
    path: str
    """As it was given to the run."""
    before: str
    """The recorded fingerprint or revision."""
    now: str | None
    """None if it is not checked: it is not a path, or it is overridden."""
    sampled: bool = False

    @property
    def changed(self) -> bool:
        return self.now is not None and self.now != self.before

    @property
    def said(self) -> str:
        """As text."""
        if self.now is None:
            return f"{self.path}, compared when it is read"
        if self.changed:
            return f"{self.path} has changed: {self.before} was recorded, now it is {self.now}"
        return f"{self.path} as recorded{' (a sample was compared)' if self.sampled else ''}"


@dataclass(frozen=True)
class Linking:
    """Puts what a run read besides its code into its unpacked code, so that the run again writes elsewhere.

    What changed after the run began may be its own output. A link to that would have the run again write to
    the user's file, or go on from a finished state; so only recorded data is linked whatever its age.
    """

    place: Place
    top: Path
    """The folder in which the code is unpacked; nothing is put outside it."""
    cwd: Path
    """Where the run was started, to which paths are relative."""
    began: float
    ended: float
    """When the run began and ended, in seconds since 1970."""

    def data(self, recorded: Mapping[str, Mapping[str, Any]]) -> None:
        """Link recorded data, also if it is gone from its place but here with the same path and content.

        Args:
            recorded: the contents of `data.json`.
        """
        here = dataclasses.replace(self, cwd=Path.cwd())
        for about in recorded.values():
            path = str(about["path"])
            if "absolute" not in about or Path(path).is_absolute():
                continue
            if _exists(self.cwd / path):
                self._link_data(path, about)
            elif _is(here.cwd / path, about):
                here._link_data(path, about)

    def left_out(self) -> list[str]:
        """Link files that the record of the code left out; returns those that are missing or have changed."""
        lacking = []
        for left in self.place.code.left_out:
            source, target = Path(self.place.code.root, left.path), self.place.root / left.path
            known = left.bytes or None  # 0 is what older records contain for links and unreadable files
            if target.is_file():  # it is data
                continue
            other = known and source.is_file() and source.stat().st_size != known
            if not source.exists() or other or not all(linked for _, linked in self._put(source, target)):
                lacking.append(left.path)
        return lacking

    def named(self, paths: Iterable[str]) -> tuple[list[str], list[str]]:
        """Link files and the files of folders that relative paths lead to, where the code has none.

        Args:
            paths: the names; those that are not paths are ignored.

        Returns:
            The paths that were linked, as far as possible; and the files that were not, as they have changed.
        """
        linked, refused = [], []
        for path in dict.fromkeys(paths):
            source, target = self._ends(path)
            of_code = any(folder.is_relative_to(target) for folder in (self.place.root, self.place.cwd))
            if of_code or not (_is_relative(path) and _exists(source) and self._is_inside(target)):
                continue
            put = dict(self._put(source, target))
            linked += [path] if any(put.values()) else []
            refused += [os.path.relpath(file, self.cwd) for file, is_linked in put.items() if not is_linked]
        return linked, refused

    def _link_data(self, path: str, about: Mapping[str, Any]) -> None:
        """Link data: what it was when the run began if that is what is recorded, or else all of it."""
        source, target = self._ends(path)
        if not self._is_inside(target):
            return
        if source.is_dir() and not os.path.lexists(target) and self._is_untouched(source):
            _link(source, target)  # it can have millions of files
        elif not all(linked for _, linked in self._put(source, target)) and not _is(target, about):
            self._put(source, target, all_of_it=True)

    def _put(self, source: Path, target: Path, *, all_of_it: bool = False) -> list[tuple[Path, bool]]:
        """Link a file, or each file of a folder, which the target lacks; a new file lands in the target.

        Args:
            all_of_it: also what changed after the run began; copied if it changed before the run ended, as
                the run may have made it, and would make it again.

        Returns:
            The files that the target lacked, and whether they were linked: not if they changed after the run
            began.
        """
        if os.path.lexists(target) and not (source.is_dir() and target.is_dir()):
            return []
        if source.is_dir():
            inner = [entry for entry in _entries(source) if not self._is_around(entry)]
            return [one for path in inner for one in self._put(path, target / path.name, all_of_it=all_of_it)]
        changed = _changed(source)
        if changed >= self.began and not all_of_it:
            return [(source, False)]
        if self.began <= changed <= self.ended:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        else:
            _link(source, target)
        return [(source, True)]

    def _ends(self, path: str) -> tuple[Path, Path]:
        """A path relative to where the run was started, and its place in the unpacked code."""
        return self.cwd / path, Path(os.path.normpath(self.place.cwd / path))

    def _is_inside(self, target: Path) -> bool:
        return target.is_relative_to(self.top) and target != self.top

    def _is_around(self, path: Path) -> bool:
        """Whether a path contains the unpacked code, or leads back to a folder that it is in."""
        whole = path.resolve()
        return self.place.root.resolve().is_relative_to(whole) or (
            path.is_symlink() and path.parent.resolve().is_relative_to(whole)
        )

    def _is_untouched(self, folder: Path) -> bool:
        """Whether nothing in a folder has changed since the run began."""
        return not self._is_around(folder) and all(
            _changed(Path(inner, name)) < self.began
            for inner, _, names in os.walk(folder, followlinks=True)
            for name in ("", *names)
        )


def layout(code: Code, paths: Iterable[str], cwd: Path) -> tuple[Path, Path]:
    """Where code and working directory are unpacked, so that relative paths lead where they did.

    Args:
        code: the code.
        paths: the names of inputs; those that are not paths are ignored.
        cwd: where the run was started.

    Returns:
        Both, relative to a folder that stands for the lowest one around them and the inputs.
    """
    at = Path(code.root, code.cwd) if code.cwd is not None else cwd
    ends = [os.path.normpath(at / path) for path in paths if _is_relative(path) and _exists(cwd / path)]
    base = os.path.commonpath([Path(code.root).parent, at, *ends])
    return Path(code.root).relative_to(base), at.relative_to(base)


def resolved(
    overrides: Iterable[str], config: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """`key=value` overrides, with paths of data, which are relative to this directory, made absolute.

    Args:
        overrides: as they were given.
        config: the values of the run; a key whose value names recorded data is a data key.
        recorded: the contents of `data.json`.

    Raises:
        BadInput: a value that can only be a path does not exist.
    """
    known = {str(about["path"]): about for about in recorded.values()}
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        had = [known[path] for path in paths_of({key: config.get(key)}) if path in known]
        parts = [value] if not had or _stands(value) else value.split(",")  # a name can contain a comma
        for part in parts if had else ():
            if part.startswith(("/", ".")) and not _stands(part):
                raise BadInput(
                    f"{key}={part} does not exist; the run read {had[0]['path']}, with fingerprint "
                    f"{data.identity(had[0])}"
                )
        found.append(f"{key}={','.join(map(_absolute, parts))}" if had else override)
    return found


def paths_of(values: Mapping[str, Any]) -> Iterator[str]:
    """What could be a path in config values, also in lists and mixtures (`a.jsonl:3,b.jsonl:1`)."""
    for value in values.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "://" not in one and "\0" not in one:
                parts = one.split(",")
                yield from (one, *parts, *(part.rpartition(":")[0] for part in parts))


def check(
    linking: Linking, recorded: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any],
    given: Collection[str],
) -> list[Input]:  # fmt: skip
    """Check the data of a run.

    Args:
        linking: has linked the data.
        recorded: the contents of `data.json`.
        config: the values of the run that can be overridden.
        given: the keys that are overridden.

    Raises:
        BadInput: data no longer exists, or cannot be read.
    """
    replaced = set(paths_of({key: config[key] for key in given if key in config}))
    found = []
    for name, about in recorded.items():
        now, sampled = None, about.get("how") == "sampled"
        if "absolute" in about and about["path"] not in replaced:
            now = _fingerprint(linking, name, about, config)
        found.append(Input(name, str(about["path"]), data.identity(about), now, sampled))
    return found


def fingerprints(recorded: Mapping[str, Mapping[str, Any]], tags: Mapping[str, str]) -> dict[str, str]:
    """What a run depends on, by name: its data by content, or else what its recipe reports.

    Args:
        recorded: the contents of `data.json`.
        tags: the run's tags.
    """
    of_tags = {key.partition(".")[2]: value for key, value in tags.items() if key.startswith("fingerprint.")}
    of_data = {name: data.identity(about) for name, about in recorded.items()}
    return {**of_tags, **of_data}


def _fingerprint(linking: Linking, name: str, about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The present fingerprint of data, where the run again will read it. Raises BadInput."""
    path, origin = linking.place.cwd / about["path"], Path(about["absolute"])
    elsewhere = os.path.normpath(linking.cwd / about["path"]) != os.path.normpath(origin)
    if not path.exists() and elsewhere:  # below a home, or the run changed its working directory
        path = origin
    try:
        return data.fingerprint(data.read_at(path, about)).fingerprint
    except OSError as error:
        lost = error.filename if path.exists() else origin
        keys = [key for key, value in config.items() if about["path"] in paths_of({key: value})]
        anew = f"restore it, or give its new location with {keys[0]}=PATH" if keys else ""
        raise BadInput(
            f"data {name!r} cannot be read: {lost or path}: {error.strerror}. It had fingerprint "
            f"{about['fingerprint']}, {about['bytes']:,} bytes in {counted(about['files'], 'file')}: "
            f"{anew or 'no key of the run names it, so restore it, or put a link to it there'}"
        ) from error


def _is(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether the data at a path is the recorded data."""
    try:
        return data.fingerprint(data.read_at(path, about)).fingerprint == about.get("fingerprint")
    except OSError:
        return False


def _absolute(part: str) -> str:
    """A path, or one of a mixture with its weight, made absolute if it exists; otherwise unchanged."""
    path, separator, weight = part.rpartition(":")
    if part and _exists(Path(part)):
        return str(Path(part).absolute())
    return f"{Path(path).absolute()}:{weight}" if separator and path and _exists(Path(path)) else part


def _stands(part: str) -> bool:
    """Whether a part of a mixture, with or without its weight, exists; a pattern is assumed to."""
    return any(sign in part for sign in "*?[") or any(
        map(_exists, (Path(part), Path(part.rpartition(":")[0] or part)))
    )


def _exists(path: Path) -> bool:
    """Whether a text that may not be a path exists as a file or folder."""
    try:
        return path.exists()
    except OSError:  # it is too long
        return False


def _is_relative(path: str) -> bool:
    return bool(path) and not Path(path).is_absolute()


def _entries(folder: Path) -> list[Path]:
    """The contents of a folder; none if it cannot be read, which matters only if the run reads it."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _changed(path: Path) -> float:
    """When a file or folder last changed in content or in place, and if it is a link, also the link.

    The time of content alone can be older than a file: copying and unpacking keep it.
    """
    try:
        found = (path.stat(), path.lstat())
    except OSError:
        return math.inf
    return max(time for status in found for time in (status.st_mtime, status.st_ctime))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())
