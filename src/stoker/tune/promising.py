"""Searching where the best trials so far are: the second stage of `--strategy staged`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

_SHARE = 4
"""One in so many trials is among the best."""
_FEWEST = 4
"""Trials that say where it is promising."""


def sampler(seed: int) -> TPESampler:
    """TPE within the ranges that the best trials span."""
    return _Promising(seed=seed, multivariate=True, constant_liar=True)


def region(space: Mapping[str, BaseDistribution], best: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The part of a space that trials span; a choice keeps all of its values."""
    return {
        name: _narrowed(found, [t.params[name] for t in best if name in t.params])
        for name, found in space.items()
    }


def best_of(study: Study) -> list[FrozenTrial]:
    """The best quarter of the trials, those that came furthest first."""
    known = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    ranked = sorted(
        (_standing(trial, sign), trial.number, trial) for trial in known if _value(trial) is not None
    )
    return [trial for _, _, trial in ranked[: len(ranked) // _SHARE]]


class _Promising(TPESampler):
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See TPESampler."""
        return super().sample_relative(study, trial, region(search_space, best_of(study)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See TPESampler."""
        narrow = region({param_name: param_distribution}, best_of(study))[param_name]
        return super().sample_independent(study, trial, param_name, narrow)


def _value(trial: FrozenTrial) -> float | None:
    if trial.values:
        return float(trial.values[0])
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def _standing(trial: FrozenTrial, sign: float) -> tuple[bool, int, float]:
    """What trials are ranked by: complete ones first, then by how far they came, then by value."""
    complete = trial.state == TrialState.COMPLETE
    step = max(trial.intermediate_values, default=0)
    return not complete, 0 if complete else -step, sign * (_value(trial) or 0.0)


def _narrowed(found: BaseDistribution, values: Sequence[float]) -> BaseDistribution:
    if len(values) < _FEWEST or not isinstance(found, FloatDistribution | IntDistribution):
        return found
    low, high = min(values), max(values)
    if isinstance(found, IntDistribution):
        return IntDistribution(int(low), int(high), log=found.log, step=found.step)
    if math.isclose(low, high):
        return found
    return FloatDistribution(low, high, log=found.log, step=found.step)
