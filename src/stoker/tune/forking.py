"""Trials that start from another trial's checkpoint: exploit and explore of population based training."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial
from stoker import storage
from stoker.checkpoint import manifest
from stoker.errors import StokerError
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.tune import bandit
from stoker.tune.plan import Plan
from stoker.tune.schedulers import PopulationBased, Trials
from stoker.tune.seen import Seen
from stoker.tune.space import Space

log = logging.getLogger("stoker")

_TRIES = 2
"""By how many forks that fail at once a trial is replaced."""


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

    None if there is none, which of a running one may change: a checkpoint is written while training goes on.

    Args:
        ended: the other run came to its end, after which there is nothing to train: the newest checkpoint
            before the end is used.
    """
    while True:
        steps = [manifest.step_of(path) for path in manifest.committed(donor.checkpoints)]
        step = _copied(donor, run, but={max(steps)} if ended and steps else set())
        if step is not None:
            return step
        if steps == [manifest.step_of(path) for path in manifest.committed(donor.checkpoints)]:
            return None  # otherwise the other run has replaced its checkpoint by a newer one in the meantime


def _copied(donor: RunDirectory, run: RunDirectory, but: set[int]) -> int | None:
    """Copy the newest checkpoint except at certain steps; None if there is none, or it was just deleted."""
    found, _ = manifest.newest(donor.checkpoints, but=but)
    if found is None:
        return None
    shutil.rmtree(run.path, ignore_errors=True)  # left behind if a controller was killed exactly here
    target = run.checkpoints / found.path.name
    try:
        shutil.copytree(found.path, target, copy_function=storage.link_or_copy)
    except OSError:
        if (found.path / manifest.NAME).is_file():
            raise
        return None
    return found.step if (target / manifest.NAME).is_file() else None


def due(
    rule: PopulationBased,
    trials: Mapping[int, Seen],
    known: Callable[[], Trials],
    number: Callable[[], int],
    directory: Callable[[int], RunDirectory],
) -> Fork | None:
    """The fork to begin in place of a stopped trial, if any; its run has the donor's checkpoint already.

    A donor that has failed since it was chosen, without a checkpoint, is replaced by another.

    Args:
        known: what schedulers decide by.
        number: the number that the fork will have.
        directory: the run of a trial.

    Raises StokerError if a donor will never have a checkpoint.
    """
    for trial in _not_replaced(trials):
        for donor in dict.fromkeys((trial.donor, rule.donor(known(), trial.number))):
            if donor is None:  # an earlier controller stopped the trial, or there is no better one now
                continue
            ended = trials[donor].state == "complete"
            step = take_checkpoint(directory(donor), directory(number()), ended=ended)
            if step is not None:
                return Fork(donor, trial.number, step)
            _check_saves(directory(donor))
            if trials[donor].state != "failed":
                break
    return None


def awaited(trials: Mapping[int, Seen]) -> bool:
    """Whether a fork waits for the first checkpoint of its donor, which is being written."""
    return any(
        trial.donor is not None and trials[trial.donor].state == "running" for trial in _not_replaced(trials)
    )


def _not_replaced(trials: Mapping[int, Seen]) -> list[Seen]:
    """The trials that were stopped and have no replacement yet, or one that failed at once."""
    replaced = {trial.replaces for trial in trials.values() if not trial.failed_at_once}
    tried = Counter(trial.replaces for trial in trials.values() if trial.failed_at_once)
    return [
        trial
        for trial in trials.values()
        if trial.state == "pruned" and trial.number not in replaced and tried[trial.number] < _TRIES
    ]


def _check_saves(donor: RunDirectory) -> None:
    """Raises StokerError for a run that trains without a Trainer, as nothing is saved of it."""
    if view.load(donor).samples_per_step is None:
        raise StokerError(
            f"{donor.id} has no checkpoint that another trial could continue from: "
            "population based training needs a recipe that trains with a Trainer"
        )


def explored(
    fork: Fork, rule: PopulationBased, trials: Mapping[int, Seen], space: Space, plan: Plan
) -> dict[str, Any]:
    """The values of a fork: near the donor's, or those that promise most by what others have gained.

    Once a fork was unfit, only floats are explored, as they hardly ever decide on the model and optimizer.
    """
    random = np.random.default_rng([plan.seed, len(trials)])
    donor = trials[fork.donor]
    found = _promising(fork, rule, trials, space, plan, random)
    if found is None:
        found = space.perturbed(donor.params, random, resample=rule.resample, factors=rule.factors)
    if not any(trial.unfit for trial in trials.values()):
        return found
    return {**donor.params, **{key: found[key] for key in space.free_floats(donor.params) if key in found}}


def _promising(
    fork: Fork, rule: PopulationBased, trials: Mapping[int, Seen], space: Space, plan: Plan,
    random: np.random.Generator,
) -> dict[str, Any] | None:  # fmt: skip
    """The values that promise most by what others have gained, if the rule learns and there is enough."""
    if not rule.learns:
        return None
    known = [
        gain for trial in trials.values()
        for gain in bandit.gains(trial.params, trial.known(plan.first).values, trial.origin[1], rule.turn)
    ]  # fmt: skip
    pending = [trial.params for trial in trials.values() if not trial.over]
    turn = rule.turn(trials[fork.donor].amount(fork.step)) + 1
    return bandit.chosen(space, known, turn, pending, random)


def say_unfit(trial: Seen, trials: Mapping[int, Seen], space: Space) -> None:
    """Say what becomes of the search if this trial is the first unfit fork."""
    if not trial.unfit or sum(other.unfit for other in trials.values()) > 1:
        return
    free = space.free_floats(trial.params)
    kept = [key for key in trial.params if key not in free]
    then = (
        f": from now on copies keep their donor's {', '.join(kept)} and explore "
        f"{', '.join(free) or 'nothing else'}, as no key that changes the model or the optimizer can change "
        "in training"
    )
    log.warning(
        "trial %d cannot go on from the checkpoint of trial %s with other values (%s)%s",
        trial.number, trial.parent, trial.error.partition("\n")[0], then if kept else "",
    )  # fmt: skip


def inherit(trial: Seen, fork: Fork | None, trials: Mapping[int, Seen]) -> None:
    """Give a forked trial the history of its donor."""
    if fork is None:
        return
    donor = trials[fork.donor]
    trial.parent, trial.replaces = fork.donor, fork.replaces
    trial.values = {s: v for s, v in donor.values.items() if s <= fork.step} | trial.values
    trial.origin = (fork.step, donor.amount(fork.step))
