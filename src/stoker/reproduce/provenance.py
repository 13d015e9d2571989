"""Provenance: what a run was made from, recorded at its start and readable with plain tools.

Git's commit and diff, the installed packages with their versions, the machine. Nothing here
may fail a run: what cannot be found out is left out.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
from stoker import machine, storage

_CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")


def code_state(folder: Path) -> dict[str, Any]:
    """The state of the git repository that holds a folder: commit, branch, remote, whether it is dirty.

    Empty outside of git. Credentials in the remote's URL are removed.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    status = _git(folder, "status", "--porcelain") or ""
    remote = _git(folder, "config", "--get", "remote.origin.url")
    return {
        "commit": commit.strip(),
        "branch": (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "remote": _CREDENTIALS.sub("", remote.strip()) if remote else None,
        "dirty": bool(status.strip()),
        "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")],
    }


def write(target: Path, folder: Path, code: dict[str, Any]) -> None:
    """Write `git.json`, `diff.patch`, `packages.txt` and `hardware.json` into a run's provenance folder."""
    storage.write_atomically(target / "git.json", _json(code))
    if code.get("dirty"):
        diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
        storage.write_atomically(target / "diff.patch", diff.encode())
    storage.write_atomically(target / "packages.txt", ("\n".join(packages()) + "\n").encode())
    storage.write_atomically(target / "hardware.json", _json(machine.hardware()))


def link(known: Path, target: Path) -> None:
    """Let a run have the provenance that stands in a folder already, in the same files where it can."""
    for file in known.iterdir():
        storage.link_or_copy(file, target / file.name)


def code_of(known: Path) -> dict[str, Any]:
    """The state of the code that stands in a provenance folder; see `code_state`."""
    return storage.read_json(known / "git.json")


def packages() -> list[str]:
    """Every installed distribution as `name==version`, sorted."""
    found = {(d.metadata["Name"] or "", d.version) for d in metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)


def _git(folder: Path, *arguments: str) -> str | None:
    return machine.output(["git", "-C", str(folder), *arguments])


def _json(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)
