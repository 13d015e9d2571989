"""Population based bandits: choose a replacement's values from the improvements that values brought so far.

PB2 (Parker-Holder et al. 2020, arXiv:2002.02518): a Gaussian process models how much a metric improves
between two comparisons as a function of time and of the hyperparameter values; a replacement gets the values
with the largest upper confidence bound. Time is an input because values that help early may not help late:
as in the paper, the kernel decays with time as (1 - epsilon)^(|t - t'| / 2), at a learned rate. Unlike in the
paper, choices are modelled too, one-hot encoded, and the bound is maximised over random samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stoker.tune.domains import Choice, Number
from stoker.tune.space import Space

_LEAST = 4  # gains needed to fit the model
_NEWEST = 100  # gains used; the cost of a Gaussian process is cubic in their number
_DRAWN = 1000  # random candidates, of which the best is chosen
_FAR = 1e5  # a length scale so long that the dimension has no effect


@dataclass(frozen=True)
class Gain:
    """The improvement that some values brought between two successive comparisons."""

    turn: int
    """The number of the later comparison, counted from 1."""
    values: Mapping[str, Any]
    """By config key."""
    gain: float
    """How much the objective (smaller is better) decreased."""


def gains(
    values: Mapping[str, Any], curve: Mapping[float, float], begins: float, turn: Callable[[float], int]
) -> list[Gain]:
    """The gains of one member between successive comparisons.

    Args:
        values: the values it trains with.
        curve: its objective (smaller is better) by resource, including what it inherited from its donor.
        begins: the resource at which its own training starts.
        turn: maps a resource to the number of comparisons reached by then.
    """
    firsts: dict[int, float] = {}
    for resource, value in curve.items():
        if resource >= begins * (1 - 1e-9):
            firsts.setdefault(turn(resource), value)
    return [Gain(at, values, firsts[at - 1] - value) for at, value in firsts.items() if at - 1 in firsts]


def chosen(
    space: Space,
    known: Sequence[Gain],
    turn: int,
    pending: Iterable[Mapping[str, Any]],
    random: np.random.Generator,
) -> dict[str, Any] | None:
    """Values to train with until the next comparison; None if there are too few gains to learn from.

    Args:
        known: the gains so far.
        turn: the comparison at which the values will be judged.
        pending: values that other members are training with; candidates near them are penalised (GP-BUCB).
        random: a generator used for this choice only.
    """
    known = sorted(known, key=lambda one: one.turn)[-_NEWEST:]
    if len(known) < _LEAST:
        return None
    places = np.array([_place(space, one.values, one.turn) for one in known])  # (gains, 1 + parameters)
    gained = np.array([one.gain for one in known])  # (gains,)
    drawn = [space.drawn(random) for _ in range(_DRAWN)]
    candidates = np.array([_place(space, values, turn) for values in drawn])  # (drawn, 1 + parameters)
    taken = [_place(space, values, turn) for values in pending]
    bounds = _upper_bounds(places, gained, np.array(taken).reshape(-1, places.shape[1]), candidates)
    return drawn[int(np.argmax(bounds))]


def _upper_bounds(
    places: NDArray[np.float64],
    gained: NDArray[np.float64],
    taken: NDArray[np.float64],
    candidates: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The upper confidence bound of each candidate's gain, (candidates,).

    As in GP-BUCB, values that are already in use (`taken`) count as observed with their predicted gain, which
    only lowers the uncertainty around them.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

    size = places.shape[1] - 1
    over_values = RBF([_FAR, *[0.5] * size], [(_FAR, _FAR), *[(0.05, 20.0)] * size])
    over_time = Matern([5.0, *[_FAR] * size], [(0.5, 1e3), *[(_FAR, _FAR)] * size], nu=0.5)
    kernel = ConstantKernel() * over_values * over_time + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about length scales at their bounds
        process.fit(places, gained)
        expected = process.predict(candidates)
        if len(taken):
            places, gained = np.vstack([places, taken]), np.append(gained, process.predict(taken))
        process = GaussianProcessRegressor(process.kernel_, normalize_y=True, optimizer=None)
        _, deviation = process.fit(places, gained).predict(candidates, return_std=True)
    weight = math.sqrt(0.2 + max(0.0, math.log(0.4 * len(gained))))  # as in the authors' code
    bounds: NDArray[np.float64] = expected + weight * deviation
    return bounds


def _place(space: Space, values: Mapping[str, Any], turn: int) -> list[float]:
    """The model's input: the turn, then numbers scaled to [0, 1] and choices one-hot encoded."""
    found = [float(turn)]
    for parameter in space.parameters:
        there = all(key in values for key in parameter.keys)
        value = parameter.joined(values) if there else None
        found += _coordinates(parameter.domain, value, there=there)
    return found


def _coordinates(domain: Number | Choice, value: Any, *, there: bool) -> list[float]:
    if isinstance(domain, Choice):
        return [float(there and value == choice) for choice in domain.values]
    if not there or domain.low == domain.high:
        return [0.5]
    scale = math.log if domain.log else float
    low, high = scale(domain.low), scale(domain.high)
    return [(scale(value) - low) / (high - low)]
