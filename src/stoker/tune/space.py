"""A search space: which parameters are drawn, in what order and when, and which keys are fixed.

What a user writes is read in `space_reading.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker import config as configs
from stoker.errors import BadInput, nearest
from stoker.tune import expressions
from stoker.tune.domains import Choice, Number, item, text

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Condition:
    """When a parameter is drawn: if the value of `key` is one of `values`, or if it is none of them."""

    key: str
    values: tuple[Any, ...]
    negated: bool = False

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it holds for the values drawn so far; never if its key is not drawn."""
        return self.key in values and (values[self.key] in self.values) != self.negated

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.key} {'!=' if self.negated else '=='} {item(self.values[0])}"
        return f"{self.key} {'not in' if self.negated else 'in'} [{', '.join(map(item, self.values))}]"


@dataclass(frozen=True)
class Parameter:
    """What is drawn together: one key, or several keys that take their values as a row."""

    keys: tuple[str, ...]
    domain: Number | Choice
    condition: Condition | None = None

    @property
    def name(self) -> str:
        """Its name in Optuna: the key, or `(lr, batch_size)`."""
        return name_of(self.keys)

    def spread(self, value: Any) -> dict[str, Any]:
        """A drawn value, split by config key."""
        return dict(zip(self.keys, value, strict=True)) if len(self.keys) > 1 else {self.keys[0]: value}

    def joined(self, values: Mapping[str, Any]) -> Any:
        """Its value, taken from the values of all keys."""
        return tuple(values[key] for key in self.keys) if len(self.keys) > 1 else values[self.keys[0]]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is drawn, given these values."""
        return self.condition is None or self.condition.holds(values)

    def column(self, key: str) -> Number | Choice:
        """The possible values of one of its keys."""
        if isinstance(self.domain, Number) or len(self.keys) == 1:
            return self.domain
        at = self.keys.index(key)
        seen = {item(row[at]): row[at] for row in self.domain.values}
        return Choice(tuple(seen.values()))

    def __str__(self) -> str:
        return f"{self.domain}{f' if {self.condition}' if self.condition else ''}"


@dataclass(frozen=True)
class Space:
    """The searched parameters, in the order in which they are drawn, and the fixed keys.

    Args:
        fixed: overrides of keys that are not searched: key -> text as given.
        parameters: each comes after the parameter that its condition depends on.
        config: the dataclass that the keys belong to.
    """

    fixed: Mapping[str, str]
    parameters: tuple[Parameter, ...]
    config: type

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draw each parameter whose condition holds.

        Args:
            trial: an Optuna trial.

        Returns:
            Config key -> value as a config's record holds it; for a Duration the number of steps.
        """
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.holds(values):
                values |= parameter.spread(parameter.domain.suggested(trial, parameter.name))
        return values

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """The fixed keys and these values as `key=text`, for `configs.resolve`."""
        fixed = [f"{key}={value}" for key, value in self.fixed.items()]
        return fixed + [f"{key}={text(value)}" for key, value in values.items()]

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Convert values that a user asks for to Optuna's params, for `study.enqueue_trial`.

        Args:
            values: config key -> value or its text; Optuna draws the keys that are left out.

        Raises BadInput for a value outside the space, a key that is not searched, a key that is not drawn
        together with the other values, and values of paired keys that match no row, or several.
        """
        given = {key: self._within(key, value) for key, value in values.items()}
        params: dict[str, Any] = {}
        for parameter in self.parameters:
            asked = {key: given[key] for key in parameter.keys if key in given}
            if not asked:
                continue
            if not parameter.holds(given):
                raise BadInput(
                    f"{_assigned(asked)}: only drawn if {parameter.condition}: "
                    f"ask for that too, or leave {parameter.name} out"
                )
            value = _only(parameter, asked)
            given |= parameter.spread(value)
            params[parameter.name] = parameter.domain.param(value)
        return params

    def grid(self) -> dict[str, list[Any]]:
        """Every value of every parameter, for Optuna's GridSampler.

        Raises BadInput for continuous ranges.
        """
        points = {parameter.name: parameter.domain.points for parameter in self.parameters}
        endless = [p for p in self.parameters if points[p.name] is None]
        if endless:
            ranges = ", ".join(f"{p.name}={p.domain}" for p in endless)
            instead = " ".join(f"{p.name}='{_instead(p.domain)}'" for p in endless)
            raise BadInput(
                f"a grid needs countable values, and {ranges} is continuous: list some values, "
                f"such as {instead}, or give uniform(...) a step"
            )
        return {name: list(found or ()) for name, found in points.items()}

    def combinations(self) -> list[dict[str, Any]]:
        """Every point of the grid, as Optuna's params; points that differ only in undrawn values count once.

        Raises BadInput for continuous ranges.
        """
        from optuna.trial import FixedTrial

        points = self.grid()
        whole = [dict(zip(points, values, strict=True)) for values in itertools.product(*points.values())]
        if not any(parameter.condition for parameter in self.parameters):
            return whole
        found: dict[str, dict[str, Any]] = {}
        for params in whole:
            trial = FixedTrial(params)
            self.suggest(trial)
            drawn = {name: params[name] for name in points if name in trial.distributions}
            found.setdefault(repr(drawn), drawn)
        return list(found.values())

    def perturbed(
        self,
        values: Mapping[str, Any],
        random: np.random.Generator,
        *,
        resample: float,
        factors: tuple[float, float],
    ) -> dict[str, Any]:
        """Values near given values: the explore step of population based training.

        Jaderberg et al. 2017, arXiv:1711.09846, section 4 and appendix A. A number is multiplied by one of
        the factors and kept within its range, and moves by at least one step if it has steps; a choice
        moves to a neighbour in its list. Conditions are evaluated again: a parameter whose condition holds
        now but did not before is drawn from its range, and one whose condition no longer holds is left out.

        Args:
            resample: the probability with which a parameter is drawn from its whole range instead.
            factors: equally likely, for example (0.8, 1.2).
        """
        explored: dict[str, Any] = {}
        for parameter in self.parameters:
            if not parameter.holds(explored):
                continue
            known = all(key in values for key in parameter.keys)
            if not known or random.random() < resample:
                value = parameter.domain.drawn(random)
            else:
                value = parameter.domain.moved(parameter.joined(values), random, factors)
            explored |= parameter.spread(value)
        return explored

    def free_floats(self, values: Mapping[str, Any]) -> list[str]:
        """The keys among these values that hold floats on which no condition depends.

        Keys that take their values as a row are all among them, or none.
        """
        conditions = {p.condition.key for p in self.parameters if p.condition is not None}
        return [
            key
            for parameter in self.parameters
            if all(type(values.get(key)) is float and key not in conditions for key in parameter.keys)
            for key in parameter.keys
        ]

    def drawn(self, random: np.random.Generator) -> dict[str, Any]:
        """Values drawn from the whole space."""
        return self.perturbed({}, random, resample=1.0, factors=(1.0, 1.0))

    def spanning(self) -> Iterator[dict[str, Any]]:
        """Points that cover both ends of each range and each choice; conditional parameters are covered in
        part."""
        marks = [
            p.domain.values if isinstance(p.domain, Choice) else (p.domain.low, p.domain.high)
            for p in self.parameters
        ]
        for number in range(max(map(len, marks), default=1)):
            point: dict[str, Any] = {}
            for parameter, values in zip(self.parameters, marks, strict=True):
                if parameter.holds(point):
                    point |= parameter.spread(values[number % len(values)])
            yield point

    def described(self) -> dict[str, str]:
        """What is searched and what is fixed, by name, as canonical texts: same meaning, same text."""
        fixed = {key: text(configs.checked(self.config, key, given)) for key, given in self.fixed.items()}
        return fixed | {parameter.name: str(parameter) for parameter in self.parameters}

    def _within(self, key: str, value: Any) -> Any:
        searched = {k: parameter for parameter in self.parameters for k in parameter.keys}
        if key in self.fixed:
            raise BadInput(f"{key}={text(value)}: {key} is fixed at {self.fixed[key]}: leave it out")
        if key not in searched:
            names = ", ".join(searched) or "nothing"
            raise BadInput(f"{key} is not searched{nearest(key, searched) or f'; searched: {names}'}")
        domain = searched[key].column(key)
        found = typed(self.config, domain, key, value, f"a value of {key}")
        if not domain.holds(found):
            raise BadInput(f"{key}={text(value)}: outside the space, {key} is searched in {domain}")
        return found


def typed(config: type, domain: Number | Choice | None, key: str, value: Any, source: str) -> Any:
    """A value in the form in which it is drawn; it may lie outside a range."""
    if not isinstance(domain, Number):
        return configs.checked(config, key, value, source)
    try:
        found = expressions.number(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadInput(f"{key}={value} ({source}): {error}; it is searched in {domain}") from error
    return domain.nearest(found) if domain.holds(found) else found


def _only(parameter: Parameter, asked: Mapping[str, Any]) -> Any:
    """The one value of a parameter that matches what is asked for."""
    if len(parameter.keys) == 1:
        return asked[parameter.keys[0]]
    assert isinstance(parameter.domain, Choice)
    rows = [row for row in parameter.domain.values
            if all(parameter.spread(row)[key] == value for key, value in asked.items())]  # fmt: skip
    if not rows:
        raise BadInput(f"{_assigned(asked)} matches no row of {parameter.name}={parameter.domain}")
    if len(rows) > 1:
        others = ", ".join(key for key in parameter.keys if key not in asked)
        raise BadInput(f"{_assigned(asked)} matches {len(rows)} rows of {parameter.name}={parameter.domain}: "
                       f"give {others} too")  # fmt: skip
    return rows[0]


def _instead(numbers: Number | Choice) -> str:
    assert isinstance(numbers, Number)
    low, high = numbers.low, numbers.high
    middle = math.sqrt(low * high) if numbers.log else (low + high) / 2
    return f"[{low}, {middle:.3g}, {high}]"


def _assigned(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={text(value)}" for key, value in values.items())


def name_of(keys: Sequence[str]) -> str:
    """How keys that are drawn together are called: `lr`, or `(lr, batch_size)`."""
    return keys[0] if len(keys) == 1 else f"({', '.join(keys)})"
