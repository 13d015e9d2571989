"""The restored code of a run: unpacked into a folder, with the same working directory inside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
        """The place of an absolute path in the unpacked code; unchanged if it is not in the bundle."""
        within = _within(path, self.code.root)
        return str(self.root / within) if within is not None and (self.root / within).exists() else path

    def python_path(self, lock: str, recorded: str = "") -> list[str]:
        """Folders to import from before all others: those parts of the code that the run imported from.

        Args:
            lock: the packages of the run, some of which may be used from its code (`pip install -e .`).
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
        root: the folder to unpack into, which is created.
        cwd: where the run was started, if that is outside its code.

    Raises:
        BadInput: there is no record of the code, or its bundle is damaged.
    """
    code = provenance.read_code(record)
    root.mkdir(parents=True)
    if code.bundle is not None:
        provenance.extract(record, root)
    elif code.files:
        raise BadInput(f"{record} contains no bundle of the run's code, so the run cannot be repeated")
    inside = root / code.cwd if code.cwd is not None else Path(cwd)
    if code.cwd is not None:
        inside.mkdir(parents=True, exist_ok=True)
    elif not inside.is_dir():
        raise BadInput(
            f"the run was started in {cwd}, outside its code, and that folder is gone: create it again"
        )
    return Place(root, inside, code)


def _within(path: str, root: str) -> str | None:
    """A path relative to a root, if it is inside."""
    try:
        return str(Path(os.path.realpath(path)).relative_to(os.path.realpath(root)))
    except ValueError:
        return None
