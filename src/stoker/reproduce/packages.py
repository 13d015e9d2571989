"""The installed packages, as a lock for `pip install -r`.

Each line has the hash of what is installed in a comment: it covers the list of files and checksums that an
installer records with a package (RECORD,
https://packaging.python.org/specifications/recording-installed-packages), without what differs from place
to place. pip's own `--hash` is for an archive that no longer exists. Packages installed from an address are
written as in PEP 508, from the file `direct_url.json` of PEP 610.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import machine, redaction, storage

_HEADER = re.compile(r"^(Name|Version):[ \t]*(\S+)", re.MULTILINE)
_OF_THE_PLACE = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json")
_INSTALLED = ("site-packages", "dist-packages")
_TORCH_INDEX = "https://download.pytorch.org/whl"
_TORCH_BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    content: str | None
    """SHA-256 of what is installed; None if there is no list of files."""
    origin: dict[str, Any]
    """PEP 610: where it was installed from; empty if that was an index."""


def installed() -> list[Package]:
    """All installed distributions (of duplicates, the one that is imported), sorted by name.

    They are remembered in the cache folder, each until its metadata or its list of files changes.
    """
    cache = storage.cache_folder() / "packages.json"
    known = storage.read_json(cache)
    noted: dict[str, Any] = {}
    seen: dict[str, Package] = {}
    for folder in _folders():
        state = _state(folder)
        found = _remembered(known.get(str(folder)), state) or _package(folder)
        if found is None:
            continue
        seen.setdefault(_normal(found.name), found)
        if state is not None and not found.origin:  # an address may have a password
            noted[str(folder)] = [state, found.name, found.version, found.content]
    if any(known.get(key) != value for key, value in noted.items()):
        storage.try_to_write_json(cache, {**known, **noted})
    return [seen[name] for name in sorted(seen)]


def lock(packages: Sequence[Package]) -> str:
    """The text of `requirements.txt`."""
    lines = [f"# Python {sys.version.split()[0]}; a hash is of what was installed, see the documentation"]
    builds = {match[1] for package in packages if (match := _TORCH_BUILD.search(package.version))}
    lines += [f"--extra-index-url {_TORCH_INDEX}/{build}" for build in sorted(builds)]
    lines += [_line(package) for package in packages]
    return "\n".join(lines) + "\n"


def versions(lock: str) -> dict[str, str]:
    """The versions in a lock by lower-case name, except editable packages and those from an address."""
    pairs = (line.partition("#")[0].strip().partition("==") for line in lock.splitlines())
    return {name.lower(): version for name, sign, version in pairs if sign}


def _line(package: Package) -> str:
    hashed = f"  # content sha256:{package.content}" if package.content else ""
    origin = package.origin
    url = redaction.text(str(origin.get("url", "")))
    if origin.get("dir_info", {}).get("editable") or url.startswith("file://"):
        return f"# {package.name}=={package.version} from {_folder_state(url)}"
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        commit = vcs.get("commit_id") or vcs.get("requested_revision", "")
        return f"{package.name} @ {vcs.get('vcs', 'git')}+{url}@{commit}{hashed}"
    if url:
        return f"{package.name} @ {url}{hashed}"
    return f"{package.name}=={package.version}{hashed}"


def _folder_state(url: str) -> str:
    """A folder that a package was installed from, with its current commit."""
    folder = url.removeprefix("file://")
    commit = machine.output(["git", "-C", folder, "rev-parse", "HEAD"])
    if commit is None:
        return folder
    changes = machine.output(["git", "--no-optional-locks", "-C", folder, "status", "--porcelain", "-uno"])
    return f"{folder}, commit {commit.strip()}{', with uncommitted changes' if changes else ''}"


def _folders() -> Iterator[Path]:
    """The metadata folders of installed packages, in the order in which they are imported.

    Packages that another one bundles in its own folder and adds to the path, as Ray does, are excluded.
    """
    for entry in dict.fromkeys(sys.path):
        place = Path(entry)
        brought = any(parent.name in _INSTALLED for parent in place.parents)
        if place.is_dir() and not brought:
            names = sorted(entry.name for entry in os.scandir(place))
            for kind in (".dist-info", ".egg-info"):
                yield from (place / name for name in names if name.endswith(kind))


def _state(folder: Path) -> list[list[int]] | None:
    """What changes with what is read of a package; None if it has no list of its files and their hashes."""
    try:
        found = [(folder / name).stat() for name in ("METADATA", "RECORD")]
    except OSError:
        return None
    return [[status.st_mtime_ns, status.st_size] for status in found]


def _remembered(noted: Any, state: list[list[int]] | None) -> Package | None:
    """What was noted of a package, if it is as it was then."""
    if state is None or not noted or noted[0] != state:
        return None
    _, name, version, content = noted
    return Package(name, version, content, {})


def _package(folder: Path) -> Package | None:
    header = _read(folder / "METADATA") or _read(folder / "PKG-INFO") or _read(folder)
    fields = dict(reversed(_HEADER.findall(header.partition("\n\n")[0])))
    if not {"Name", "Version"} <= fields.keys():
        return None
    record = folder / "RECORD"
    content = _hash(_read(record)) if record.exists() else None
    origin = storage.read_json(folder / "direct_url.json") or _source_of(folder)
    return Package(fields["Name"], fields["Version"], content, origin)


def _source_of(folder: Path) -> dict[str, Any]:
    """The folder of a package that is not installed: its sources are on the path through PYTHONPATH."""
    if folder.suffix != ".egg-info" or folder.parent.name in _INSTALLED:
        return {}
    return {"url": f"file://{folder.parent}", "dir_info": {"editable": True}}


def _hash(record: str) -> str:
    """SHA-256 over the sorted `path,hash` lines of files that are the same wherever they are installed.

    Scripts differ: their first line names the interpreter. So does the installer's own metadata.
    """
    lines = sorted(
        f"{row[0]},{row[1]}\n"
        for row in csv.reader(record.splitlines())
        if len(row) > 1 and row[1] and not row[0].startswith("../") and Path(row[0]).name not in _OF_THE_PLACE
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _normal(name: str) -> str:
    """Normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
