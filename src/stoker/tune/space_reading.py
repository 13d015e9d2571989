"""Reads a search space, written with a recipe's own config keys.

    lr='log(1e-5, 1e-3)' batch_size='[16, 32, 64]' lora.rank='int(4, 64, log) if optimizer == adamw'
    dropout='uniform(0.1, 0.5, step=0.1)' '(warmup, epochs)=[(0.1, 1), (0.05, 3)]' optimizer='[adamw, sgd]'

The same syntax works in a YAML file or a Python mapping. Anything that is not an expression fixes a key. For
a key that takes a list, a list is its value and a list of lists is a list of choices. Everything is checked
against the recipe's config before anything starts.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stoker import config as configs
from stoker.duration import Duration
from stoker.errors import BadInput, nearest
from stoker.tune import expressions, wandb_sweep
from stoker.tune.domains import Choice, Number, item, text
from stoker.tune.expressions import Comparison, Items
from stoker.tune.space import Condition, Parameter, Space, name_of, typed

log = logging.getLogger("stoker")

_PAIRED = re.compile(r"\((.*)\)", re.DOTALL)
_ONE = r"[-+]?[\d_.]*\d(?:[eE][-+]?\d+)?"
_SEVERAL_NUMBERS = re.compile(rf"[({{\s]*{_ONE}\s*(?:\.\.|to\b|[-:,| ])\s*{_ONE}.*")
"""As other tools write a range or choices: `0..1`, `1e-5:1e-3`, `(1e-5, 1e-3)`, `8,16`."""


def parse(overrides: Sequence[str], config: type, file: Path | None = None) -> Space:
    """Read a space from the command line, on top of a YAML file.

    Args:
        overrides: `key=text`, and `(key, key)=text` for keys that take their values together.
        config: the recipe's config dataclass.

    Raises BadInput for what cannot be parsed, and for what the config does not accept.
    """
    keys = configs.describe(config)
    content = {} if file is None else configs.read_yaml(file)
    if wandb_sweep.is_one(content) and "parameters" not in keys:
        raise BadInput(f"{file} is a sweep of W&B; the same here: {wandb_sweep.as_command(content)}")
    below = _entries(config, configs.flatten(content, str(file), keys).items(), str(file))
    above = _entries(config, map(configs.split, overrides), configs.COMMAND_LINE)
    return _space(config, list({frozenset(entry.keys): entry for entry in (*below, *above)}.values()))


def parse_mapping(values: Mapping[Any, Any], config: type) -> Space:
    """Read a space from a Python mapping with dotted or nested keys; otherwise like `parse`.

    Keys that take their values together can be a tuple. A numpy array lists choices, a range of Python's is
    one of integers, and Optuna's distributions can be given as they are.
    """
    source = "the mapping"
    values = {
        f"({', '.join(map(str, key))})" if isinstance(key, tuple) else key: value
        for key, value in values.items()
    }
    flat = configs.flatten(values, source, configs.describe(config))
    return _space(config, _entries(config, ((key, _spelled(value)) for key, value in flat.items()), source))


def _spelled(value: Any) -> Any:
    """A value from Python as it is written in a file."""
    from optuna.distributions import BaseDistribution

    if isinstance(value, range) and value:
        ends = min(value), max(value)
        return str(Number(*ends, integer=True, step=abs(value.step))) if len(value) > 1 else value[0]
    if isinstance(value, BaseDistribution):
        return _of_optuna(value)
    return _listed(value)


def _of_optuna(given: Any) -> Any:
    """The expression for a distribution of Optuna's."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(given, CategoricalDistribution):
        return list(given.choices)
    integer, step = isinstance(given, IntDistribution), None if given.log else given.step
    return str(Number(given.low, given.high, integer, given.log, step))


def _listed(value: Any) -> Any:
    """A numpy array as a list, and a number of numpy's as one of Python's, also in rows of values."""
    if isinstance(value, list | tuple):
        return type(value)(map(_listed, value))
    return value.tolist() if hasattr(value, "tolist") else value


def parse_tries(tries: str) -> dict[str, str]:
    """Parse values to try, such as `lr=1e-4,batch_size=16`: config key -> text. Raises BadInput."""
    try:
        parts, rest = expressions.bracketed(f"({tries})")
        parts = [expressions.plain(part) for part in parts]  # "model=a, b" in quotes is one
    except ValueError:
        parts, rest = [], tries
    if rest:
        raise BadInput(
            f"cannot parse {tries!r}: write values to try as in lr=1e-4,batch_size=16, "
            f"with every bracket and quote closed"
        )
    values: dict[str, str] = {}
    for part in parts:
        key, value = configs.split(part)
        if key in values:
            raise BadInput(f"{key} is given twice in {tries!r}: leave out one of the two")
        values[key] = value.strip()
    return values


@dataclass(frozen=True)
class _Entry:
    """The value given for a key, or for several paired keys."""

    keys: tuple[str, ...]
    value: Any
    source: str

    def __str__(self) -> str:
        return f"{name_of(self.keys)}={text(self.value)} ({self.source})"


@dataclass(frozen=True)
class _Draft:
    """A parsed entry whose condition is not resolved yet."""

    entry: _Entry
    keys: tuple[str, ...]
    domain: Number | Choice | None  # None: a fixed value
    comparison: Comparison | None


def _entries(config: type, pairs: Iterable[tuple[str, Any]], source: str) -> list[_Entry]:
    """The entries of one source."""
    entries: list[_Entry] = []
    for name, value in pairs:
        paired = _PAIRED.fullmatch(name.strip())
        keys = tuple(key.strip() for key in paired[1].split(",")) if paired else (name,)
        if not paired and set(name) & set("()[]"):  # {rank: int(4, 8)} in YAML is two keys
            raise BadInput(
                f"{name} ({source}) is part of an expression, not a key: quote the expression, '...(a, b)'"
            )
        for key in keys:
            configs.kinds(config, key, source)  # refuses an unknown one
        entries.append(_Entry(keys, value, source))
    _refuse_twice(entries)
    return entries


def _refuse_twice(entries: Iterable[_Entry]) -> None:
    seen: dict[str, _Entry] = {}
    for entry in entries:
        for key in entry.keys:
            if key in seen:
                raise BadInput(
                    f"{key} is given twice, by {seen[key]} and by {entry}: leave out one of the two"
                )
            seen[key] = entry


def _space(config: type, entries: Sequence[_Entry]) -> Space:
    _refuse_twice(entries)
    given = {key for entry in entries for key in entry.keys}
    for key, (_, default) in configs.describe(config).items():
        if default is dataclasses.MISSING and key not in given:
            raise BadInput(f"{key} needs a value: add {key}=..., a value or an expression")
    drafts = [_draft(config, entry) for entry in entries]
    fixed = {draft.keys[0]: draft.entry for draft in drafts if draft.domain is None}
    values = {key: _fixed(config, key, entry) for key, entry in fixed.items()}
    domains = {key: draft for draft in drafts if draft.domain is not None for key in draft.keys}
    parameters = [
        Parameter(draft.keys, draft.domain, _condition(config, draft, values, domains))
        for draft in drafts
        if draft.domain is not None
    ]
    return Space(
        {key: text(entry.value) for key, entry in fixed.items()},
        tuple(_drawable(_ordered(parameters, values), values)),
        config,
    )


def _fixed(config: type, key: str, entry: _Entry) -> Any:
    """The value of a key that is not searched.

    Raises BadInput; for an object, and for a text such as `0:1`, also with how to search.
    """
    try:
        return configs.checked(config, key, entry.value, entry.source)
    except BadInput as error:
        kinds = configs.kinds(config, key)
        is_number = kinds & {int, float} and not kinds & {tuple, list}
        if isinstance(entry.value, str) and is_number and _SEVERAL_NUMBERS.fullmatch(entry.value):
            forms = ", ".join(_range_forms(kinds, "a, b"))
            raise BadInput(f"{error}; to search it, write {key}={forms} or '[a, b]'") from error
        if entry.value is None or isinstance(entry.value, str | int | float | list | Mapping):
            raise
        raise BadInput(
            f"{error}; to search, write choices as a list, [a, b], and a range as a text: 'uniform(a, b)', "
            "'log(a, b)' or 'int(a, b)'"
        ) from error


def _draft(config: type, entry: _Entry) -> _Draft:
    try:
        found = expressions.read(entry.value, configs.describe(config))
        if len(entry.keys) > 1:
            keys, rows = _rows(config, entry, found.body)
            return _Draft(entry, keys, Choice(rows), found.condition)
        domain = _domain(config, entry, found.body)
        if domain is None and found.condition is not None:
            body = list(found.body.values) if isinstance(found.body, Items) else found.body
            domain = Choice((configs.checked(config, entry.keys[0], body, str(entry)),))
        return _Draft(entry, entry.keys, domain, found.condition)
    except ValueError as error:
        raise BadInput(f"{entry}: {error}") from error


def _rows(config: type, entry: _Entry, body: Any) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """Paired keys and their values, in the config's order, so that a pair has one name in any order."""
    example = f"[({', '.join('a' for _ in entry.keys)}), ({', '.join('b' for _ in entry.keys)})]"
    if not isinstance(body, Items):
        raise ValueError(f"paired keys take a list of rows: write {example}")
    order = list(configs.describe(config))
    keys = sorted(entry.keys, key=order.index)
    rows = []
    for given in body.values:
        row = expressions.structured(given) if isinstance(given, str) else given  # YAML has no (a, b)
        if not isinstance(row, list | tuple) or len(row) != len(keys):
            raise ValueError(f"row {text(given)} must have {len(keys)} values: write {example}")
        cells = dict(zip(entry.keys, row, strict=True))
        rows.append(tuple(configs.checked(config, key, cells[key], str(entry)) for key in keys))
    return tuple(keys), tuple(rows)


def _domain(config: type, entry: _Entry, body: Any) -> Number | Choice | None:
    """The domain of a single key, or None if it has one value."""
    key = entry.keys[0]
    if isinstance(body, Number):
        _check_range(config, entry, body)
        return body
    if not isinstance(body, Items):
        return None
    nested = any(isinstance(value, list | tuple) for value in body.values)
    if body.brackets and not nested and configs.kinds(config, key) & {tuple, list}:
        return None
    _check_unlike_range(config, entry)
    return Choice(tuple(configs.checked(config, key, value, str(entry)) for value in body.values))


def _check_unlike_range(config: type, entry: _Entry) -> None:
    """Refuse a tuple of two numbers, by which other libraries mean a range."""
    value, kinds = entry.value, configs.kinds(config, entry.keys[0])
    numbers = isinstance(value, tuple) and all(type(one) in (int, float) for one in value)
    if not numbers or len(value) != 2 or not kinds & {int, float, Duration}:
        return
    ends = f"{text(value[0])}, {text(value[1])}"
    ranges = " or ".join(_range_forms(kinds, ends))
    raise ValueError(
        f"a tuple of two numbers can mean a range or two choices: write {ranges} for a range, [{ends}] for "
        "choices"
    )


def _range_forms(kinds: Collection[type], ends: str) -> list[str]:
    """How a range with these ends can be written for a key that takes values of these kinds."""
    return [f"'{form}({ends})'" for form in (("uniform", "log") if float in kinds else ("int",))]


def _check_range(config: type, entry: _Entry, numbers: Number) -> None:
    key = entry.keys[0]
    kinds = configs.kinds(config, key)
    if not kinds & {int, float, Duration}:
        raise ValueError(f"{key} does not take a range of numbers: list the choices, [a, b]")
    if not numbers.integer and float not in kinds:
        form = "int(low, high, log)" if numbers.log else "int(low, high)"
        raise ValueError(f"{key} takes whole numbers: write {form}")
    grain = numbers.grain or 0  # a constraint such as "a multiple of 8" shows in the values next to the ends
    for value in (numbers.low, numbers.high, numbers.low + grain, numbers.high - grain):
        configs.checked(config, key, numbers.nearest(value), str(entry))


def _condition(
    config: type, draft: _Draft, fixed: Mapping[str, Any], searched: Mapping[str, _Draft]
) -> Condition | None:
    asked = draft.comparison
    if asked is None:
        return None
    configs.kinds(config, asked.key, f"the condition of {name_of(draft.keys)}")
    if asked.key not in (*fixed, *searched):
        raise BadInput(
            f"{draft.entry}: {asked.key} in its condition is neither searched nor fixed"
            f"{nearest(asked.key, (*fixed, *searched))}: add {asked.key}=..."
        )
    source = f"the condition of {name_of(draft.keys)}"
    parent = searched.get(asked.key)
    domain = Parameter(parent.keys, parent.domain).column(asked.key) if parent and parent.domain else None
    values = {item(v): v for v in (typed(config, domain, asked.key, t, source) for t in asked.values)}
    condition = Condition(asked.key, tuple(values[name] for name in sorted(values)), asked.negated)
    if domain is not None and not _may_hold(condition, domain):
        raise BadInput(
            f"{draft.entry}: would never be drawn, because {asked.key} is searched in {domain}: "
            f"change the condition"
        )
    return condition


def _may_hold(condition: Condition, domain: Number | Choice) -> bool:
    if isinstance(domain, Choice):
        return any(condition.holds({condition.key: value}) for value in domain.values)
    if condition.negated:
        return domain.low != domain.high or domain.low not in condition.values
    counted = domain.grain is not None or domain.low == domain.high  # a continuous value never comes up twice
    return counted and any(domain.holds(value) for value in condition.values)


def _ordered(parameters: Sequence[Parameter], fixed: Mapping[str, Any]) -> list[Parameter]:
    """In the given order, but each after the parameter that its condition depends on."""
    ordered: list[Parameter] = []
    known = set(fixed)
    left = list(parameters)
    while left:
        ready = next((p for p in left if p.condition is None or p.condition.key in known), None)
        if ready is None:
            raise BadInput(f"the conditions of {', '.join(p.name for p in left)} are circular: "
                           f"remove one of them")  # fmt: skip
        left.remove(ready)
        ordered.append(ready)
        known |= set(ready.keys)
    return ordered


def _drawable(parameters: Iterable[Parameter], fixed: Mapping[str, Any]) -> Iterator[Parameter]:
    """Resolve conditions on fixed keys: each always holds, or its parameter is never drawn."""
    drawn: set[str] = set()
    for parameter in parameters:
        condition = parameter.condition
        if condition is not None and condition.key not in drawn:
            if not condition.holds(fixed):
                key = condition.key
                now = f"fixed at {item(fixed[key])}" if key in fixed else "not searched"
                log.info(
                    "%s is not searched: drawn only if %s, and %s is %s", parameter.name, condition, key, now
                )
                continue
            condition = None
        drawn |= set(parameter.keys)
        yield replace(parameter, condition=condition)
