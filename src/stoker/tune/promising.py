"""Searching where the best trials so far are: the second stage of `--strategy staged`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

NEWEST = "newest"
"""The attribute of a trial with its newest step and values, where objectives are several."""
_SHARE = 4
"""One in so many trials is among the best."""
_FEWEST = 4
"""Trials that say where it is promising."""
_MARGIN = 0.1
"""Of a range, on either side of what the best span: few trials do not come to its ends."""


def sampler(seed: int, drawn_at_random: int) -> TPESampler:
    """TPE within the ranges that the best of so many first trials span, which were drawn at random."""
    return _Promising(seed, drawn_at_random)


def region(space: Mapping[str, BaseDistribution], best: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The part of a space that trials span, and a margin around it; a choice keeps all of its values."""
    return {
        name: _narrowed(found, [t.params[name] for t in best if name in t.params])
        for name, found in space.items()
    }


def best_of(study: Study, first: int) -> list[FrozenTrial]:
    """The best quarter of so many first trials, those that came furthest first.

    By those that were drawn within them the ranges would become ever smaller, and never larger again.
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
    """What trials are ranked by: complete ones first, then by how far they came, then by value."""
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
