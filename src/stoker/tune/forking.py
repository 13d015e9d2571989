"""A trial that starts from another trial's checkpoint: the exploit step of population based training."""

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
    """Which trial a fork continues from, at which step, and which trial it replaces."""

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
    """Give a new run the newest checkpoint of another run, sharing its files; returns the step.

    Args:
        ended: the other run came to its end, after which there is nothing to train: the newest checkpoint
            before the end is used, and None is returned if there is none.

    Raises StokerError if the other run has no checkpoint at all.
    """
    steps = [manifest.step_of(path) for path in manifest.committed(donor.checkpoints)]
    found, _ = manifest.newest(donor.checkpoints, but={max(steps)} if ended and steps else set())
    if found is None and ended and steps:
        return None
    if found is None:
        raise StokerError(
            f"{donor.id} has no checkpoint that another trial could continue from: "
            "population based training needs a recipe that trains with a Trainer"
        )
    shutil.rmtree(run.path, ignore_errors=True)  # left behind if a controller was killed exactly here
    target = run.checkpoints / found.path.name
    shutil.copytree(found.path, target, copy_function=storage.link_or_copy)
    return found.step
