"""A run that is made again: what `stoker reproduce` asks of the process that trains it.

The command starts that process as the run was started once, a recipe or somebody's own script, and names
a file in STOKER_AGAIN. The run that is meant, when it is opened, takes from there where it stands, what it
is made from, and at which step it ends; every other run that the process opens is left as it is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import config as configs
from stoker import redaction, storage

VARIABLE = "STOKER_AGAIN"
TAG = "reproduces"
"""The tag of a run that names the run that it makes again."""


@dataclass(frozen=True)
class Again:
    """The run that is made, and the one that it is to equal."""

    runs: str
    experiment: str
    id: str
    of: Mapping[str, str]
    """`experiment`, `id` and `uid` of the run that is made again."""
    given: str
    """The experiment that the code itself names, by which with the config the run is known."""
    config: Mapping[str, Any]
    seed: int
    provenance: str
    """The folder with the record of the code."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    """What the run decided itself of how it computes."""
    until: int | None = None
    """The last step that is made; None where it ends by itself."""

    @property
    def parent(self) -> dict[str, str]:
        """As `run.json` has it among `parents`."""
        return {**self.of, "relation": TAG}


def write(file: Path, again: Again) -> None:
    """Write what the variable names."""
    storage.write_atomically(file, orjson.dumps(dataclasses.asdict(again)))


def taken(experiment: str, name: str | None, config: Any, seed: int) -> Again | None:
    """What is asked of a run that is being opened, if it is the one that is meant; once in a process."""
    if VARIABLE not in os.environ:
        return None
    again = Again(**orjson.loads(Path(os.environ[VARIABLE]).read_bytes()))
    by_name = (experiment, name) == (again.experiment, again.id)
    if not by_name and (experiment, seed, _plain(config)) != (again.given, again.seed, again.config):
        return None
    del os.environ[VARIABLE]
    return again


def _plain(config: Any) -> dict[str, Any]:
    """A config as it comes back from `run.json`."""
    known = configs.record(config) if dataclasses.is_dataclass(config) else dict(config or {})
    plain: dict[str, Any] = orjson.loads(orjson.dumps(redaction.tree(known)))
    return plain
