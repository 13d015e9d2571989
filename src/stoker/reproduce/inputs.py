"""What a run read besides its code: found again, checked, and put where the run expects it.

Data that the config names by a path relative to the working directory, and files of the code that the
record left out, are linked into the unpacked code from their original place; or, if the project was moved,
from where the command is given.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.errors import BadInput
from stoker.reproduce import data
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


def link_left_out(place: Place) -> list[str]:
    """Link files that the record of the code left out, if their size is unchanged; returns missing ones."""
    lacking = []
    for left in place.code.left_out:
        source, target = Path(place.code.root, left.path), place.root / left.path
        known = left.bytes or None  # 0 is what older records contain for links and unreadable files
        if not source.exists() or (known and source.is_file() and source.stat().st_size != known):
            lacking.append(left.path)
        elif not os.path.lexists(target):
            _link(source, target)
    return lacking


def link(place: Place, paths: Iterable[str], cwd: Path) -> None:
    """Link files and folders that are named by relative paths and that the code does not contain.

    Args:
        place: the code.
        paths: the names; names that are not paths are ignored.
        cwd: where the run was started, to which they are relative.
    """
    for path in dict.fromkeys(paths):
        source, target = cwd / path, Path(os.path.normpath(place.cwd / path))
        known = not path or Path(path).is_absolute() or not _exists(source) or os.path.lexists(target)
        if not known and target.is_relative_to(place.root.parent):
            _link(source.resolve(), target)


def link_moved(place: Place, recorded: Mapping[str, Mapping[str, Any]], cwd: Path) -> None:
    """Link data that is gone from its original place, but exists here with the same path and content.

    Args:
        place: the code.
        recorded: the contents of `data.json`.
        cwd: where the run was started.
    """
    for about in recorded.values():
        path, here = str(about["path"]), Path.cwd() / str(about["path"])
        gone = "absolute" in about and not Path(path).is_absolute() and not _exists(cwd / path)
        if gone and _exists(here) and _is(here, str(about["fingerprint"])):
            link(place, [path], Path.cwd())


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
    place: Place, recorded: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], given: Collection[str]
) -> list[Input]:
    """Check the data of a run.

    Args:
        place: the code, with what is linked into it.
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
            now = _fingerprint(place, name, about, config)
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


def _fingerprint(place: Place, name: str, about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The present fingerprint of data. Raises BadInput."""
    there = place.cwd / about["path"]
    path = there if there.exists() else Path(about["absolute"])
    try:
        return data.fingerprint(path).fingerprint
    except OSError as error:
        keys = [key for key, value in config.items() if about["path"] in paths_of({key: value})]
        anew = f"restore it, or give its new location with {keys[0]}=PATH" if keys else ""
        raise BadInput(
            f"data {name!r} cannot be read: {error.filename or path}: {error.strerror}. It had fingerprint "
            f"{about['fingerprint']}, {about['bytes']:,} bytes in {counted(about['files'], 'file')}: "
            f"{anew or 'no key of the run names it, so restore it, or put a link to it there'}"
        ) from error


def _is(path: Path, fingerprint: str) -> bool:
    """Whether data has the recorded fingerprint."""
    try:
        return data.fingerprint(path).fingerprint == fingerprint
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


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
