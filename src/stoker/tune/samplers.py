"""Optuna's samplers, made anew for each trial from the search's seed and the trial's number.

So a resumed search draws the same values as an uninterrupted one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import optuna
from numpy.random import SeedSequence, default_rng  # numpy imports numpy.random lazily
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from stoker.errors import BadInput, nearest
from stoker.tune import promising
from stoker.tune.space import Space

SAMPLERS = ("random", "grid", "qmc", "tpe", "gp", "cmaes", "nsga2", "nsga3")
STAGED = "staged"
SEVERAL = ("random", "grid", "qmc", "tpe", "nsga2", "nsga3", "gp")
"""Samplers that support several objectives."""


class _Learned(Study):
    """A study as samplers see it: a trial that is RUNNING and has values counts as ended.

    Otherwise samplers would learn nothing from trials that wait at a rung, as most of ASHA's do until the
    search ends.
    """

    @classmethod
    def of(cls, study: Study) -> _Learned:
        """Wrap a study."""
        learned = cls.__new__(cls)
        learned.__dict__ = study.__dict__
        return learned

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [as_far(trial) for trial in super()._get_trials(deepcopy, use_cache=use_cache)]
        return [trial for trial in found if states is None or trial.state in states]


def as_far(trial: FrozenTrial) -> FrozenTrial:
    """A trial with what it has reached, as its result; itself if it has ended or reached nothing."""
    newest = trial.user_attrs.get(promising.NEWEST)
    if newest and trial.state in (TrialState.RUNNING, TrialState.PRUNED):
        ended = copy.copy(trial)
        ended.state, ended.values = TrialState.COMPLETE, newest["values"]  # pruned trials have none
        return ended
    if trial.state != TrialState.RUNNING or not trial.intermediate_values:
        return trial
    ended = copy.copy(trial)
    ended.state = TrialState.PRUNED
    return ended


class Seeded(BaseSampler):
    """Creates a new sampler for each trial, seeded by its number, so that a restart changes no draw.

    Args:
        make: creates a sampler from a seed and the trial's number.
        seed: the search's seed.
        learns: whether the draws depend on the results of other trials.
    """

    def __init__(self, make: Callable[[int, int], BaseSampler], seed: int, *, learns: bool = True) -> None:
        self._make, self._seed, self.learns = make, seed, learns
        self._of_open: dict[int, BaseSampler] = {}
        """The samplers of unfinished trials."""

    def _of(self, number: int) -> BaseSampler:
        if number not in self._of_open:
            drawn = SeedSequence([self._seed, number]).generate_state(1)
            self._of_open[number] = self._make(int(drawn[0]), number)
        return self._of_open[number]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """See BaseSampler, as for the others."""
        return self._of(trial.number).infer_relative_search_space(_Learned.of(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return self._of(trial.number).sample_relative(_Learned.of(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """See BaseSampler."""
        return self._of(trial.number).sample_independent(
            _Learned.of(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        self._of(trial.number).before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See BaseSampler."""
        self._of(trial.number).after_trial(study, trial, state, values)
        del self._of_open[trial.number]


class _Point(BaseSampler):
    """Returns the values of one point of a grid."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """See BaseSampler, as for the others."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """See BaseSampler."""
        return self._values[param_name]


def make(name: str, space: Space, seed: int, trials: int = 0) -> Seeded:
    """An Optuna sampler by its short name. Raises BadInput.

    Args:
        seed: the search's seed. What must be the same for all trials (the order of a grid, the scrambling of
            a sequence) depends on this seed only.
        trials: the number of planned trials; for `staged`, the first half of them are random.
    """
    samplers = optuna.samplers
    if name not in (*SAMPLERS, STAGED):
        raise BadInput(f"--sampler {name}: give one of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    if name == "grid":
        points = space.combinations()
        default_rng(seed).shuffle(points)
        return Seeded(lambda _, number: _Point(points[number % len(points)]), seed, learns=False)
    anew = samplers.RandomSampler()
    makers: dict[str, Callable[[int, int], BaseSampler]] = {
        "random": lambda drawn, _: _again(anew, drawn),
        "qmc": lambda drawn, _: samplers.QMCSampler(
            seed=seed,
            scramble=True,
            independent_sampler=samplers.RandomSampler(seed=drawn),
            warn_independent_sampling=False,
        ),
        "tpe": lambda drawn, _: samplers.TPESampler(
            seed=drawn, multivariate=True, group=True, constant_liar=True
        ),
        "gp": lambda drawn, _: samplers.GPSampler(seed=drawn),
        "cmaes": lambda drawn, _: samplers.CmaEsSampler(seed=drawn),
        "nsga2": lambda drawn, _: samplers.NSGAIISampler(seed=drawn),
        "nsga3": lambda drawn, _: samplers.NSGAIIISampler(seed=drawn),
        STAGED: lambda drawn, number: (
            _again(anew, drawn) if number < trials // 2 else promising.sampler(drawn, trials // 2)
        ),
    }
    return Seeded(makers[name], seed, learns=name != "random")


def _again(random: RandomSampler, seed: int) -> RandomSampler:
    """Reseed a sampler: equivalent to a new sampler, without the cost of creating its generator."""
    random._rng.rng.seed(seed)
    return random
