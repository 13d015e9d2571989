"""What a run read besides its code: found again, compared with what was recorded, and put where it looks.

Data that the config names by a path relative to the working directory, and files of the code that the record
left out, are linked into the unpacked code from where they were; data that is gone from there, as the project
was moved, from where the command is given.
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
    """A dataset of a run as it is found now."""

    name: str
    path: str
    """As the run was given it."""
    before: str
    """The fingerprint, or the revision, that was recorded."""
    now: str | None
    """None where it is not looked at: it is no path, or it is given anew."""
    sampled: bool = False

    @property
    def changed(self) -> bool:
        return self.now is not None and self.now != self.before

    @property
    def said(self) -> str:
        """In words."""
        if self.now is None:
            return f"{self.path}, compared when it is read"
        if self.changed:
            return f"{self.path} has changed: {self.before} was recorded, now it is {self.now}"
        return f"{self.path} as recorded{' (a sample was compared)' if self.sampled else ''}"


def link_left_out(place: Place) -> list[str]:
    """Link what the record of the code left out, if it is as large as it was; returns what is not there."""
    lacking = []
    for left in place.code.left_out:
        source, target = Path(place.code.root, left.path), place.root / left.path
        known = left.bytes or None  # 0 is what older records say of links and of what could not be read
        if not source.exists() or (known and source.is_file() and source.stat().st_size != known):
            lacking.append(left.path)
        elif not os.path.lexists(target):
            _link(source, target)
    return lacking


def link(place: Place, paths: Iterable[str], cwd: Path) -> None:
    """Link those files and folders that are named by relative paths and that the code does not hold.

    Args:
        place: the code.
        paths: the names; what is no path is passed over.
        cwd: where the run was started, from which they are meant.
    """
    for path in dict.fromkeys(paths):
        source, target = cwd / path, Path(os.path.normpath(place.cwd / path))
        known = not path or Path(path).is_absolute() or not _exists(source) or os.path.lexists(target)
        if not known and target.is_relative_to(place.root.parent):
            _link(source.resolve(), target)


def link_moved(place: Place, recorded: Mapping[str, Mapping[str, Any]], cwd: Path) -> None:
    """Link data that is gone from where it was, but stands where we are, by the same path and content.

    Args:
        place: the code.
        recorded: what `data.json` says.
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
    """`key=value` that are given anew, where paths of data are meant from where we are: absolute then.

    Args:
        overrides: as they were given.
        config: the values of the run; a key of which the value names recorded data is one of data.
        recorded: what `data.json` says.

    Raises:
        BadInput: what can only be a path leads nowhere.
    """
    known = {str(about["path"]): about for about in recorded.values()}
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        had = [known[path] for path in paths_of({key: config.get(key)}) if path in known]
        parts = [value] if not had or _stands(value) else value.split(",")  # a name may have a comma
        for part in parts if had else ():
            if part.startswith(("/", ".")) and not _stands(part):
                raise BadInput(
                    f"{key}={part} does not exist; the run read {had[0]['path']}, with fingerprint "
                    f"{_known(had[0])}"
                )
        found.append(f"{key}={','.join(map(_absolute, parts))}" if had else override)
    return found


def paths_of(values: Mapping[str, Any]) -> Iterator[str]:
    """What may be a path in config values, those of a list and of a mixture (`a.jsonl:3,b.jsonl:1`) each."""
    for value in values.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "://" not in one and "\0" not in one:
                parts = one.split(",")
                yield from (one, *parts, *(part.rpartition(":")[0] for part in parts))


def check(
    place: Place, recorded: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], given: Collection[str]
) -> list[Input]:
    """Look at the data of a run.

    Args:
        place: the code, with what is linked into it.
        recorded: what `data.json` says.
        config: the values of the run that can be given anew.
        given: the keys that are given anew.

    Raises:
        BadInput: data is not there any more, or cannot be read.
    """
    replaced = set(paths_of({key: config[key] for key in given if key in config}))
    found = []
    for name, about in recorded.items():
        now, sampled = None, about.get("how") == "sampled"
        if "absolute" in about and about["path"] not in replaced:
            now = _fingerprint(place, name, about, config)
        found.append(Input(name, str(about["path"]), _known(about), now, sampled))
    return found


def fingerprints(recorded: Mapping[str, Mapping[str, Any]], tags: Mapping[str, str]) -> dict[str, str]:
    """What a run says that it depends on, by name: its data by content, else what its recipe says of it.

    Args:
        recorded: what `data.json` says.
        tags: the run's tags.
    """
    of_tags = {key.partition(".")[2]: value for key, value in tags.items() if key.startswith("fingerprint.")}
    of_data = {
        name: str(about.get("fingerprint") or about.get("revision", "")) for name, about in recorded.items()
    }
    return {**of_tags, **of_data}


def _known(about: Mapping[str, Any]) -> str:
    """What tells the content of recorded data apart."""
    return str(about.get("fingerprint") or about.get("revision", ""))


def _fingerprint(place: Place, name: str, about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Of data now. Raises BadInput."""
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
    """Whether data is what was recorded."""
    try:
        return data.fingerprint(path).fingerprint == fingerprint
    except OSError:
        return False


def _absolute(part: str) -> str:
    """A path, or one of a mixture with its weight, if something stands there; else as it is."""
    path, separator, weight = part.rpartition(":")
    if part and _exists(Path(part)):
        return str(Path(part).absolute())
    return f"{Path(path).absolute()}:{weight}" if separator and path and _exists(Path(path)) else part


def _stands(part: str) -> bool:
    """Whether there is what a part of a mixture names, with its weight or without; a pattern may match."""
    return any(sign in part for sign in "*?[") or any(
        map(_exists, (Path(part), Path(part.rpartition(":")[0] or part)))
    )


def _exists(path: Path) -> bool:
    """Of a text that may be no path at all."""
    try:
        return path.exists()
    except OSError:  # it is too long
        return False


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
