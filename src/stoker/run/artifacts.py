"""Artifacts: what a run made, recorded with sizes and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stoker import storage
from stoker.run.directory import RunDirectory


def describe(directory: RunDirectory, path: Path) -> list[dict[str, Any]]:
    """Every file of an artifact: path relative to the run, size in bytes, SHA-256.

    Raises FileNotFoundError where there is nothing at `path`, ValueError where it lies
    outside the run's directory.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    root = directory.path.resolve()
    return [
        {
            "path": str(file.resolve().relative_to(root)),
            "size": file.stat().st_size,
            "sha256": storage.sha256(file),
        }
        for file in storage.files_under(path)
    ]
