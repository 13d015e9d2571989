"""Lineage: which run made an artifact that another run uses.

The use is recorded in the journals of both runs, so either one shows it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import storage
from stoker.errors import BadInput, nearest
from stoker.run import additions, finding, view
from stoker.run.directory import RunDirectory

_CLOCKS = 2.0  # seconds by which a file may seem newer than its record on a network file system


@dataclass(frozen=True)
class UsedArtifact:
    """An artifact that is about to be used."""

    name: str
    path: Path
    files: list[dict[str, Any]]
    maker: dict[str, str] | None
    """The run that made it: uid, id, experiment; None if no run did."""
    directory: RunDirectory | None


def resolve(runs: Path, reference: Path | str) -> UsedArtifact:
    """The artifact that `RUN:NAME` or a path refers to. Raises BadInput."""
    path = Path(reference)
    if path.exists():
        return _by_path(path.absolute())
    run, colon, name = str(reference).rpartition(":")
    if not colon or not run:
        raise BadInput(f"{path} does not exist; give a path, or RUN:NAME for an artifact of a run")
    maker = finding.find(runs, run)
    made = view.load(maker).artifacts
    if name not in made:
        has = ", ".join(made) or "none"
        raise BadInput(f"run {maker.id!r} has no artifact {name!r}{nearest(name, made)}; it has: {has}")
    return _recorded(maker, made[name])


def tell_maker(found: UsedArtifact, user: RunDirectory, uid: str) -> None:
    """Record in the journal of the run that made an artifact which run uses it, if that can be written.

    If the journal's copy in an object store cannot be, a warning says so.
    """
    if found.directory is None or found.directory.path == user.path:
        return
    about = {"uid": uid, "id": user.id, "experiment": user.experiment}
    with contextlib.suppress(OSError):
        additions.add(found.directory, {"used_by": {"name": found.name, "run": about}})


def _by_path(path: Path) -> UsedArtifact:
    resolved = path.resolve()
    for folder in resolved.parents:
        if (folder / "run.json").is_file():
            maker = RunDirectory(folder)
            for event in view.load(maker).artifacts.values():
                if (folder / event["path"]).resolve() == resolved:
                    return _recorded(maker, event)
            files = _checked(folder, storage.files_under(resolved))
            return UsedArtifact(str(resolved.relative_to(folder)), path, files, _identity(maker), maker)
    base = resolved if resolved.is_dir() else resolved.parent
    return UsedArtifact(path.name, path, _checked(base, storage.files_under(resolved)), None, None)


def _recorded(maker: RunDirectory, event: dict[str, Any]) -> UsedArtifact:
    """An artifact as it was recorded; a file that seems newer than its record is hashed again."""
    path = maker.path / event["path"]
    if not path.exists():
        raise BadInput(f"artifact {event['name']!r} of run {maker.id!r} is missing: {path}")
    for file in event["files"]:
        place = maker.path / file["path"]
        status = place.stat() if place.is_file() else None
        if status is None or status.st_size != file["size"]:
            raise BadInput(f"{place} is not what run {maker.id!r} recorded: it is gone or its size differs")
        young = status.st_mtime > event["time"] + _CLOCKS
        if young and storage.sha256(place) != file["sha256"]:
            raise BadInput(f"{place} is not what run {maker.id!r} recorded: its checksum differs")
    return UsedArtifact(event["name"], path, event["files"], _identity(maker), maker)


def _identity(run: RunDirectory) -> dict[str, str]:
    return {"uid": run.record()["uid"], "id": run.id, "experiment": run.experiment}


def _checked(base: Path, files: list[Path]) -> list[dict[str, Any]]:
    return [
        {"path": str(file.relative_to(base)), "size": file.stat().st_size, "sha256": storage.sha256(file)}
        for file in files
    ]
