"""Values for a member of a population by what values have gained so far: population based bandits.

PB2 (Parker-Holder et al. 2020, arXiv:2002.02518): how much a metric improves between two comparisons is
learned, by a Gaussian process, as a function of when it was and which values were trained with; a replacement
takes the values of the largest upper confidence bound. When counts, since what helps early need not help
late: the kernel falls off with time as the paper's does, (1 - epsilon)^(|t - t'| / 2), at a rate that is
learned. Unlike there, choices take part, a number each, and the bound is maximised over drawn values.
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

_LEAST = 4  # gains from which something is learned
_NEWEST = 100  # gains; a Gaussian process takes the cube of them
_DRAWN = 1000  # values among which the best is looked for
_FAR = 1e5  # a length scale along which nothing changes


@dataclass(frozen=True)
class Gain:
    """What was gained with some values from one comparison to the next."""

    turn: int
    """The comparison at its end, counted from 1."""
    values: Mapping[str, Any]
    """By config key."""
    gain: float
    """How much smaller the objective, of which smaller is better, has become."""


def gains(
    values: Mapping[str, Any], curve: Mapping[float, float], begins: float, turn: Callable[[float], int]
) -> list[Gain]:
    """What one member has gained from each comparison to the next.

    Args:
        values: it trains with these.
        curve: its objective by resource, smaller is better, with what its donor did before.
        begins: the resource from which it trains itself.
        turn: how many comparisons a resource has reached.
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
    """Values to train with until the next comparison; None while too little is known.

    Args:
        known: what was gained so far.
        turn: the comparison at whose end they are judged.
        pending: values that others train with now, which are not to be tried once more (GP-BUCB).
        random: of this choice alone.
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

    As in GP-BUCB, what is taken already counts as if it had gained what is expected of it: it lowers the
    uncertainty around it, and nothing else.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

    size = places.shape[1] - 1
    over_values = RBF([_FAR, *[0.5] * size], [(_FAR, _FAR), *[(0.05, 20.0)] * size])
    over_time = Matern([5.0, *[_FAR] * size], [(0.5, 1e3), *[(_FAR, _FAR)] * size], nu=0.5)
    kernel = ConstantKernel() * over_values * over_time + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of length scales at the ends of what they may be
        process.fit(places, gained)
        expected = process.predict(candidates)
        if len(taken):
            places, gained = np.vstack([places, taken]), np.append(gained, process.predict(taken))
        process = GaussianProcessRegressor(process.kernel_, normalize_y=True, optimizer=None)
        _, deviation = process.fit(places, gained).predict(candidates, return_std=True)
    weight = math.sqrt(0.2 + max(0.0, math.log(0.4 * len(gained))))  # as the authors' own code has it
    bounds: NDArray[np.float64] = expected + weight * deviation
    return bounds


def _place(space: Space, values: Mapping[str, Any], turn: int) -> list[float]:
    """When, and what of each parameter: a number of its range as its share, choices as a number each."""
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
