"""Provenance: what a run was made from, recorded at its start and readable with plain tools.

  code.json         which files, of which commit, and what was left out
  code.tar.gz       those files
  diff.patch        the differences from the commit
  requirements.txt  the installed packages
  environment.json  the interpreter, the machine, variables
  data.json         the data, by content; see `reproduce.data`

Nothing here can make a run fail: what cannot be determined is left out, with a warning. Secrets are removed
from all of it; see `redaction`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from stoker import storage
from stoker.errors import BadInput
from stoker.reproduce import bundle, code, environment, packages, shipped
from stoker.reproduce.code import Code

T = TypeVar("T")

log = logging.getLogger("stoker")

CODE = "code.json"
DIFF = "diff.patch"
REQUIREMENTS = "requirements.txt"
ENVIRONMENT = "environment.json"
DATA = "data.json"

_OF_GIT = ("commit", "branch", "remote", "dirty", "untracked")


@dataclass(frozen=True)
class Gathered:
    """The code that a run is about to be made from."""

    code: Code
    contents: Mapping[str, bytes]
    """The content of each file, by path."""
    diff: bytes


def gather(source: Path, runs: Path | None = None) -> Gathered:
    """Read the code of a script, or of the repository that contains a folder.

    Args:
        source: the script, or a folder.
        runs: the folder of the runs, which is not code.
    """
    found = shipped.find(source) or code.find(source, runs)
    listed, contents = bundle.read(found)
    return Gathered(listed, contents, found.diff)


def state(source: Path, runs: Path) -> dict[str, Any]:
    """Like `summary`, for the present code; empty, with a warning, if it cannot be read.

    Args:
        source, runs: see `gather`.
    """
    gathered = _try("the code", lambda: gather(source, runs))
    return summary(gathered.code) if gathered is not None else {}


def record(target: Path, source: Path, runs: Path, store: Path) -> dict[str, Any]:
    """Record everything but the data in a run's provenance folder; returns what `run.json` says about it.

    Warns of what cannot be recorded.

    Args:
        target: the existing folder.
        source, runs: see `gather`.
        store: the folder for bundles that runs share.
    """
    gathered = _try("the code", lambda: gather(source, runs))
    if gathered is not None:
        write(target, gathered, store)
        return summary(gathered.code)
    write_environment(target)
    return {}


def write(target: Path, gathered: Gathered, store: Path) -> None:
    """Write what was gathered, and the environment; see `record`."""
    _try("the code", lambda: _write_code(target, gathered, store))
    write_environment(target)


def write_environment(target: Path) -> None:
    """Write only the packages and the machine of this process, for a run whose code is another's."""
    _try("the environment", lambda: _write_environment(target))


def link(known: Path, target: Path) -> None:
    """Give a run the provenance of an existing folder, by hard links if possible."""
    for file in known.iterdir():
        (target / file.name).unlink(missing_ok=True)
        storage.link_or_copy(file, target / file.name)


def summary_of(known: Path) -> dict[str, Any]:
    """Like `summary`, for a provenance folder; empty if that has no code."""
    file = known / CODE
    return dict(_summary_at(file, storage.modified(file)))


@functools.lru_cache(16)
def _summary_at(file: Path, modified: int) -> Mapping[str, Any]:
    """The summary of a file with this modification time, cached as all trials of a search share it."""
    return _summary(storage.read_json(file))


def summary(found: Code) -> dict[str, Any]:
    """What `run.json` says about the code: its location, and its commit."""
    return _summary(_as_json(found))


def _summary(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in ("kind", "root", "script", *_OF_GIT) if key in said}


def same(one: Code, other: Code) -> bool:
    """Whether two states of the code are the same, wherever they were read."""
    return (one.root, one.commit, one.files) == (other.root, other.commit, other.files)


def is_recorded(folder: Path) -> bool:
    """Whether a folder contains the provenance of a run."""
    return (folder / CODE).is_file()


def read_code(folder: Path) -> Code:
    """The code in a provenance folder. Raises BadInput if there is none."""
    file = folder / CODE
    try:
        return code.from_json(orjson.loads(file.read_bytes()))
    except FileNotFoundError:
        raise BadInput(f"{file} does not exist: the code of this run was not recorded") from None
    except (OSError, orjson.JSONDecodeError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error


def extract(folder: Path, target: Path) -> Code:
    """Unpack the code in a provenance folder; returns its description.

    Args:
        folder: the provenance folder.
        target: the folder to unpack into, created if needed.

    Raises:
        BadInput: there is no bundle, it is damaged, or something in it points outside the target.
    """
    found = read_code(folder)
    if found.bundle is None or found.bundle_xxh3 is None:
        raise BadInput(f"{folder / CODE} names no bundle: the code of this run was not recorded")
    bundle.unpack(folder / found.bundle, target, found.bundle_xxh3, found.files)
    return found


def _write_code(target: Path, gathered: Gathered, store: Path) -> None:
    found = gathered.code
    if found.files:
        xxh3 = bundle.pack(target / bundle.NAME, found.files, gathered.contents, store)
        found = dataclasses.replace(found, bundle=bundle.NAME, bundle_xxh3=xxh3)
    if gathered.diff:
        storage.write_atomically(target / DIFF, gathered.diff)
    storage.write_atomically(target / CODE, _json(_as_json(found)))


def _as_json(found: Code) -> dict[str, Any]:
    said = dataclasses.asdict(found)
    return said if found.kind == "git" else {key: said[key] for key in said if key not in _OF_GIT}


def _write_environment(target: Path) -> None:
    installed = packages.installed()
    storage.write_atomically(target / REQUIREMENTS, packages.lock(installed).encode())
    storage.write_atomically(target / ENVIRONMENT, _json(environment.describe(installed)))


def _try(what: str, do: Callable[[], T]) -> T | None:
    """Do it, turning any error into a warning: no training may fail because of it."""
    try:
        return do()
    except Exception as error:
        log.warning("%s of the run was not recorded: %s: %s", what, type(error).__name__, error)
        return None


def _json(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)
