"""The Optuna study of a search, in Optuna's own storage, which Optuna's dashboard can open too.

By default the storage is Optuna's journal, in a file next to the trials (see `stores.py`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from stoker import redaction
from stoker.errors import BadInput
from stoker.run import finding, view
from stoker.tune import record, seen
from stoker.tune.plan import SHARE, Goal, Objective
from stoker.tune.samplers import Seeded, as_far
from stoker.tune.space import Space
from stoker.tune.stores import Database, Kept

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("optuna").propagate = False

NAME = "sweep"
EARLIER = "earlier"
"""The attribute of trials copied from another search, with that search's name."""


def learns(study: Study) -> bool:
    """Whether the values of a study's next trial depend on the results of other trials."""
    return not isinstance(study.sampler, Seeded) or study.sampler.learns


def learn_from(study: Study, earlier: Study, name: str, space: Space) -> tuple[int, int]:
    """Copy the trials of an earlier search, called `name`, to a new study, as drawn from its space.

    Those that ended early or wait at a rung are copied too: after a search with a scheduler most have.

    Optuna's samplers go on drawing from the first distribution that a parameter had, or do not model one that
    had several.

    Returns:
        The number of trials that were copied, and of those that were not, having a value outside the space.
    """
    known = [
        trial
        for trial in map(as_far, earlier.get_trials(deepcopy=False))
        if trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.PRUNED and trial.intermediate_values)
    ]
    copied = 0
    for trial in known:
        drawn = _drawn_from(space, trial)
        if drawn is None:
            continue
        copied += 1
        study.add_trial(
            optuna.create_trial(
                state=trial.state,
                params=trial.params,
                distributions={**trial.distributions, **drawn},
                values=trial.values,
                intermediate_values=trial.intermediate_values,
                user_attrs={EARLIER: name},
            )
        )
    return copied, len(known) - copied


def _drawn_from(space: Space, trial: FrozenTrial) -> dict[str, BaseDistribution] | None:
    """The distributions of a space for a trial's values, by name; None if one of them is outside it."""
    found: dict[str, BaseDistribution] = {}
    for parameter in space.parameters:
        name = parameter.name
        if name not in trial.params:
            continue
        given = FixedTrial({name: trial.params[name]})
        with quiet():  # about a value outside
            parameter.domain.suggested(given, name)
        found[name] = given.distributions[name]
        if not found[name]._contains(found[name].to_internal_repr(trial.params[name])):
            return None
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(file: Path) -> Study:
    """The study in a journal, for reading only, also during the search."""
    return optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(file))))


def of(folder: Path) -> Study:
    """The study of the search in a folder, whatever its storage, as its trials stand. Raises BadInput."""
    known = record.read(folder)
    url = known.get("storage", "")
    if not url:
        return _as_trained(read(folder / record.STUDY), folder, known)
    if redaction.holds_redacted(url):
        url = os.environ.get("STOKER_STORAGE") or ""
    if not url:
        raise BadInput(f"{folder.name} is stored in {known['storage']}: set STOKER_STORAGE to its URL")
    return _as_trained(read_shared(url, known["study"]), folder, known)


def _as_trained(study: Study, folder: Path, known: Mapping[str, Any]) -> Study:
    """A study in which those trials are complete, too, whose runs were resumed later and then finished.

    Optuna never changes a trial that has ended, so it is a copy.
    """
    goals = zip(known["metric"].split(", "), known["goal"].split(", "), strict=True)
    objectives = [Objective(metric, "max" if goal == "max" else "min") for metric, goal in goals]
    trials = study.get_trials(deepcopy=False)
    now = [_trained_since(trial, folder, objectives) or trial for trial in trials]
    if all(one is other for one, other in zip(now, trials, strict=True)):
        return study
    copied = optuna.create_study(directions=study.directions)
    copied.add_trials(now)
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, value)
    return copied


def _trained_since(trial: FrozenTrial, folder: Path, objectives: Sequence[Objective]) -> FrozenTrial | None:
    """A trial that ended early or failed, with what its run has reached since, if it has finished."""
    told = trial.user_attrs
    if trial.state not in (TrialState.PRUNED, TrialState.FAIL) or EARLIER in told or "run" not in told:
        return None
    run = finding.locate(folder.parent, told.get("sweep", folder.name), told["run"])
    found = view.load(run) if run.exists() and SHARE not in told.get("spent", {}) else None
    if found is None or not seen.trained_since(trial, found, objectives):
        return None
    values, points = seen.newest(found, objectives), seen.points(found, objectives[0].metric)
    several = {"values": [list(point) for point in points.items()]} if len(objectives) > 1 else {}
    whole = copy.copy(trial)
    whole.state, whole.values = TrialState.COMPLETE, [values[one.metric] for one in objectives]
    whole.intermediate_values = {} if several else {int(step): value for step, value in points.items()}
    whole.user_attrs = {**told, **several}
    return whole


def read_shared(url: str, name: str) -> Study:
    """The study of this name in a database. Raises BadInput."""
    try:
        return optuna.load_study(study_name=name, storage=Database(url, new=False).storage)
    except KeyError as error:
        raise BadInput(f"{record.shown(url)} has no study {name}") from error


def exists(kept: Kept, name: str) -> bool:
    """Whether there is a study of this name."""
    return name in optuna.get_all_study_names(kept.storage)


def opened(kept: Kept, made_by: BaseSampler, goals: Sequence[Goal], name: str = NAME) -> Study:
    """The study of this name, created if it does not exist."""
    if exists(kept, name):
        return optuna.load_study(study_name=name, storage=kept.storage, sampler=made_by)
    directions = [StudyDirection.MINIMIZE if goal == "min" else StudyDirection.MAXIMIZE for goal in goals]
    with kept.together():  # if two processes create it at once, one loads it
        return optuna.create_study(
            study_name=name, storage=kept.storage, sampler=made_by, directions=directions, load_if_exists=True
        )
