"""Reproducing a run: how `stoker reproduce` instructs the process that trains it.

The command starts that process as the original run was started, with its recipe or script, and sets
STOKER_AGAIN to the path of a file. When the process opens the run that reproduces the original, that run
takes its place, its origin (recipe, sources, code) and its last step from the file. Other runs that the
process opens are not affected.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.run import values

VARIABLE = "STOKER_AGAIN"
TAG = "reproduces"
"""The tag that names the run that this run reproduces."""


@dataclass(frozen=True)
class Again:
    """A run to be made, and the original run that it reproduces."""

    runs: str
    experiment: str
    id: str
    of: Mapping[str, str]
    """`experiment`, `id` and `uid` of the original run."""
    given: str
    """The experiment that the code names; with the seed and the config it identifies the run."""
    config: Mapping[str, Any]
    seed: int
    provenance: str
    """The folder with the original run's code record."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    """How the original run used the devices, see `AttemptView.layout`."""
    until: int | None = None
    """The last step to train; None if the run ends by itself."""

    @property
    def parent(self) -> dict[str, str]:
        """The entry for `parents` in `run.json`."""
        return {**self.of, "relation": TAG}


def write(file: Path, again: Again) -> None:
    """Write the file that the variable names."""
    storage.write_atomically(file, orjson.dumps(dataclasses.asdict(again)))


def taken(experiment: str, name: str | None, config: Any, seed: int) -> Again | None:
    """The instructions for a run that is being opened, if they are meant for it; at most once per process."""
    if VARIABLE not in os.environ:
        return None
    again = Again(**orjson.loads(Path(os.environ[VARIABLE]).read_bytes()))
    by_name = (experiment, name) == (again.experiment, again.id)
    by_config = (experiment, seed) == (again.given, again.seed) and values.of_config(config) == again.config
    if not by_name and not by_config:
        return None
    del os.environ[VARIABLE]
    return again
