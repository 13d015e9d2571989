"""Where the code of a run stands again: unpacked into a folder, with its inputs where it looks for them.

The working directory is the same place within it. What the bundle left out, and what the config names by a
path relative to that directory, is linked there from where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.errors import BadInput
from stoker.reproduce import differences, provenance
from stoker.reproduce.code import Code


@dataclass(frozen=True)
class Place:
    """The code of a run, unpacked."""

    root: Path
    """Stands for the root that the code was recorded from."""
    cwd: Path
    code: Code

    def mapped(self, path: str) -> str:
        """An absolute path, of what it stands for here where it is in the bundle; else as it is."""
        within = _within(path, self.code.root)
        return str(self.root / within) if within is not None and (self.root / within).exists() else path

    def python_path(self, lock: str, recorded: str = "") -> list[str]:
        """The folders to import from before all others: those of the code that were imported from then.

        Args:
            lock: the packages of the run, of which some may be used from its code (`pip install -e .`).
            recorded: the PYTHONPATH of the run.
        """
        used = (package.folder.partition(", commit ")[0] for package in differences.locked(lock).values())
        folders = [Path(folder) for folder in used if folder]
        sources = [str(f / "src" if self._has(f / "src") else f) for f in folders]
        wanted = [*recorded.split(os.pathsep), *sources]
        here = (self.mapped(str(Path(self.code.root, self.code.cwd or ".", path))) for path in wanted if path)
        return list(dict.fromkeys(path for path in here if Path(path).is_relative_to(self.root)))

    def _has(self, folder: Path) -> bool:
        within = _within(str(folder), self.code.root)
        return within is not None and (self.root / within).is_dir()


def materialise(record: Path, root: Path, cwd: str) -> Place:
    """Unpack the code of a run.

    Args:
        record: the run's provenance folder.
        root: the folder to unpack into, which is made.
        cwd: where the run was started, for one that was started outside of its code.

    Raises:
        BadInput: there is no record of the code, or its bundle is damaged.
    """
    code = provenance.read_code(record)
    root.mkdir(parents=True)
    if code.bundle is not None:
        provenance.extract(record, root)
    elif code.files:
        raise BadInput(f"{record} has no bundle of the run's code: it cannot be run again from its record")
    inside = root / code.cwd if code.cwd is not None else Path(cwd)
    if code.cwd is not None:
        inside.mkdir(parents=True, exist_ok=True)
    elif not inside.is_dir():
        raise BadInput(
            f"the run was started in {cwd}, outside of its code, and that folder is gone: make it again"
        )
    return Place(root, inside, code)


def link_left_out(place: Place) -> list[str]:
    """Link what the bundle left out and is still where it was, unchanged in size; returns what is not."""
    lacking = []
    for left in place.code.left_out:
        source, target = Path(place.code.root, left.path), place.root / left.path
        if not source.exists() or (source.is_file() and source.stat().st_size != left.bytes):
            lacking.append(left.path)
        elif not target.exists():
            _link(source, target)
    return lacking


def link_inputs(place: Place, config: Mapping[str, Any], cwd: Path) -> dict[str, str]:
    """Link the files and folders that config values name by relative paths, and the code does not hold.

    Args:
        place: the code.
        config: the values.
        cwd: where the run was started.

    Returns:
        What was linked: the path as it is given -> where it is.
    """
    linked = {}
    for path in dict.fromkeys(_paths(config)):
        source, target = cwd / path, Path(os.path.normpath(place.cwd / path))
        known = not path or Path(path).is_absolute() or not _exists(source) or os.path.lexists(target)
        if not known and target.is_relative_to(place.root.parent):
            _link(source.resolve(), target)
            linked[path] = str(source.resolve())
    return linked


def _paths(config: Mapping[str, Any]) -> Iterator[str]:
    """What may be a path in the values, those of a list and of a mixture (`a.jsonl:3,b.jsonl:1`) each."""
    for value in config.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "://" not in one and "\0" not in one:
                yield one
                for part in one.split(","):
                    yield part
                    yield part.rpartition(":")[0]


def _exists(path: Path) -> bool:
    """Of a text that may be no path at all."""
    try:
        return path.exists()
    except OSError:  # it is too long
        return False


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


def _within(path: str, root: str) -> str | None:
    """A path relative to a root, if it is within."""
    try:
        return str(Path(os.path.realpath(path)).relative_to(os.path.realpath(root)))
    except ValueError:
        return None
