"""Searching the region of the best trials so far: the second stage of `--strategy staged`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

NEWEST = "newest"
"""The trial attribute with its newest step and values, if there are several objectives."""
_SHARE = 4
"""One in this many trials counts among the best."""
_FEWEST = 4
"""The minimum number of trials to narrow a range by."""
_MARGIN = 0.1
"""The margin around the best trials, as a share of the whole range, since a few trials span too little."""


def sampler(seed: int, drawn_at_random: int) -> TPESampler:
    """TPE within the ranges spanned by the best of the first `drawn_at_random` trials."""
    return _Promising(seed, drawn_at_random)


def region(space: Mapping[str, BaseDistribution], best: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The part of a space that the best trials span, with a margin; a choice keeps all of its values."""
    return {
        name: _narrowed(found, [t.params[name] for t in best if name in t.params])
        for name, found in space.items()
    }


def best_of(study: Study, first: int) -> list[FrozenTrial]:
    """The best quarter of the first `first` trials, ranked by how far they were trained, then by value.

    Later trials do not count: they are drawn within the ranges of the best, so the ranges could only shrink.
    """
    known = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    ranked = sorted(
        (_standing(trial, sign), trial.number, trial)
        for trial in known
        if trial.number < first and _value(trial) is not None
    )
    return [trial for _, _, trial in ranked[: len(ranked) // _SHARE]]


class _Promising(TPESampler):
    def __init__(self, seed: int, drawn_at_random: int) -> None:
        super().__init__(seed=seed, multivariate=True, constant_liar=True)
        self._first = drawn_at_random

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See TPESampler."""
        return super().sample_relative(study, trial, region(search_space, best_of(study, self._first)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See TPESampler."""
        narrow = region({param_name: param_distribution}, best_of(study, self._first))[param_name]
        return super().sample_independent(study, trial, param_name, narrow)


def _value(trial: FrozenTrial) -> float | None:
    if trial.values:
        return float(trial.values[0])
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def _standing(trial: FrozenTrial, sign: float) -> tuple[bool, float, float]:
    """The sort key of a trial: complete trials first, then by how far they were trained, then by value."""
    newest = trial.user_attrs.get(NEWEST)
    if newest:
        return False, -newest["step"], sign * newest["values"][0]
    complete = trial.state == TrialState.COMPLETE
    step = max(trial.intermediate_values, default=0)
    return not complete, 0 if complete else -step, sign * (_value(trial) or 0.0)


def _narrowed(found: BaseDistribution, values: Sequence[float]) -> BaseDistribution:
    if len(values) < _FEWEST or not isinstance(found, FloatDistribution | IntDistribution):
        return found
    scaled, back = (math.log, math.exp) if found.log else (float, float)
    margin = _MARGIN * (scaled(found.high) - scaled(found.low))
    low = max(float(found.low), back(scaled(min(values)) - margin))
    high = min(float(found.high), back(scaled(max(values)) + margin))
    if isinstance(found, IntDistribution):
        steps = [math.ceil((low - found.low) / found.step), math.floor((high - found.low) / found.step)]
        ends = [found.low + count * found.step for count in steps]
        return IntDistribution(ends[0], ends[1], log=found.log, step=found.step)
    if found.step is not None:
        low = found.low + math.ceil((low - found.low) / found.step - 1e-9) * found.step
        high = found.low + math.floor((high - found.low) / found.step + 1e-9) * found.step
    return found if math.isclose(low, high) else FloatDistribution(low, high, log=found.log, step=found.step)
