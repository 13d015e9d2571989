"""A trial that begins from another one's checkpoint: population based training's exploit."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial
from stoker import storage
from stoker.checkpoint import manifest
from stoker.errors import StokerError
from stoker.run.directory import RunDirectory


@dataclass(frozen=True)
class Fork:
    """Which trial it goes on from, at which step, and in whose place."""

    donor: int
    replaces: int
    step: int

    @property
    def attributes(self) -> dict[str, Any]:
        """As the study has it."""
        return {"fork": asdict(self)}


def of(trial: FrozenTrial) -> Fork | None:
    """What a study's trial was forked from, if it was."""
    known = trial.user_attrs.get("fork")
    return Fork(**known) if known else None


def take_checkpoint(donor: RunDirectory, run: RunDirectory, *, ended: bool) -> int | None:
    """Let a run that is to begin have the newest checkpoint of another, in the same files; returns its step.

    Args:
        ended: the other one came to its end, behind which there is nothing to train: the newest before it is
            taken, and None is returned where there is none.

    Raises StokerError where there is none at all.
    """
    steps = [manifest.step_of(path) for path in manifest.committed(donor.checkpoints)]
    found, _ = manifest.newest(donor.checkpoints, but={max(steps)} if ended and steps else set())
    if found is None and ended and steps:
        return None
    if found is None:
        raise StokerError(
            f"{donor.id} has no checkpoint that another trial could go on from: "
            "a population is for recipes that train with a Trainer"
        )
    shutil.rmtree(run.path, ignore_errors=True)  # left by a controller that was killed right here
    target = run.checkpoints / found.path.name
    shutil.copytree(found.path, target, copy_function=storage.link_or_copy)
    return found.step
