"""The expressions of a search space: `log(1e-5, 1e-3)`, `[16, 32] if optimizer == adamw`.

This is a small parser: nothing that a user wrote is evaluated. Quoting follows YAML. Everything here
raises ValueError for a text that cannot be parsed, and knows nothing about configs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml
from stoker.errors import nearest
from stoker.tune.domains import Number

FORMS = {
    "log": "log(low, high)",
    "uniform": "uniform(low, high) or uniform(low, high, step=0.1)",
    "int": "int(low, high), int(low, high, log) or int(low, high, step=4)",
    "choice": "choice(a, b)",
}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_TOKEN = re.compile(
    r"""(?P<quoted> "(?:[^"\\]|\\.)*" | '(?:[^']|'')*' )
      | (?P<mark> [\[\](){},] )
      | (?P<plain> [^\s\[\](){},"'][^\[\](){},]* )
      | (?P<space> \s+ )""",
    re.VERBOSE | re.DOTALL,
)
_CALL = re.compile(r"([A-Za-z_]\w*)\(")
_UNKNOWN = re.compile(r"[A-Za-z_]\w*\([^()]*\)")  # looks like a form, but is not one
_COMPARISON = re.compile(r"([\w.]+)(\s*==|\s*!=|\s+in\b|\s+not\s+in\b)\s*(.+)", re.DOTALL)
_SEVERAL = re.compile(r"\s(and|or)\s|==|!=|\s(not\s+)?in\s*[\[(]")
_PLAIN_IF = re.compile(r"(.*\S)\s+if\s+(([\w.]+)(?:\s*==|\s*!=|\s+in\b|\s+not\s+in\b).+)", re.DOTALL)


@dataclass(frozen=True)
class Items:
    """Values listed one by one: texts and lists of texts, or values from YAML."""

    values: tuple[Any, ...]
    brackets: bool = True
    """Written as a list, not as choice(...)."""


@dataclass(frozen=True)
class Comparison:
    """`key == value`, `key != value`, `key in [a, b]` or `key not in [a, b]`."""

    key: str
    values: tuple[str, ...]
    negated: bool


@dataclass(frozen=True)
class Expression:
    """What follows a key: a range, a list, or any other value unchanged; and its condition."""

    body: Number | Items | Any
    condition: Comparison | None = None


def read(value: Any, keys: Collection[str]) -> Expression:
    """Parse a text, or a value from YAML or Python.

    Args:
        keys: a plain text may contain an `if`: it counts as a condition only if it is on one of these keys.
    """
    if isinstance(value, list | tuple):
        return Expression(Items(tuple(value)))
    if not isinstance(value, str):
        return Expression(value)
    stripped = value.strip()
    call = _CALL.match(stripped)
    name = call[1] if call else ""
    if stripped.startswith("[") or name in FORMS:
        values, rest = bracketed(stripped[len(name) :])
        if name in ("", "choice"):
            return Expression(Items(tuple(map(structured, values)), brackets=not name), _condition(rest))
        return Expression(_range(name, values), _condition(rest))
    if _UNKNOWN.fullmatch(stripped):
        raise ValueError(
            f"unknown {name}(...){nearest(name, FORMS)}; write {', '.join(FORMS.values())} "
            f"or [a, b]; write a plain text that looks like this as ['...']"
        )
    conditional = _PLAIN_IF.fullmatch(stripped)
    if conditional and conditional[3] in keys:
        return Expression(conditional[1], _comparison(conditional[2]))
    return Expression(value)


def bracketed(text: str) -> tuple[list[str], str]:
    """The items of the list at the start of a text, as texts, and the rest of the text."""
    items: list[str] = []
    expected: list[str] = []
    start, position = 1, 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(f"the quote in {text[position:]} is not closed")
        mark, position = token["mark"], token.end()
        if mark in _CLOSING:
            expected.append(_CLOSING[mark])
        elif mark == ",":
            if len(expected) == 1:
                items.append(text[start : token.start()].strip())
                start = position
        elif mark:
            if expected.pop() != mark:
                raise ValueError(f"unmatched {mark} in {text[:position]}")
            if not expected:
                last = text[start : token.start()].strip()
                items += [last] if last else []  # a trailing comma is allowed
                if "" in items:
                    raise ValueError(f"nothing between two commas in {text[:position]}")
                return items, text[position:].strip()
    raise ValueError(f"missing {expected[-1]} at the end of {text}")


def structured(text: str) -> Any:
    """An item: a nested list, or a text without its quotes."""
    if text[:1] not in ("[", "("):
        return plain(text)
    items, rest = bracketed(text)
    if rest:
        raise ValueError(f"unexpected {rest} after a bracket: quote all of {text}")
    return [structured(inner) for inner in items]


def plain(text: str) -> str:
    """An item without its quotes."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, str):
        raise ValueError(f"{text} is not one quoted text: quote all of it, and double a ' within '...'")
    return found


def number(text: str) -> int | float:
    """A number: an int if it is written as one (16), else a float (1e-3, 16.0)."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{text} is not a number")
    return found


def whole(value: int | float) -> int:
    """A number without a fraction, as an int."""
    if value != int(value):
        raise ValueError(f"{value} is not a whole number: write uniform(low, high), or log(low, high)")
    return int(value)


def _range(name: str, items: list[str]) -> Number:
    if len(items) not in (2, 3):
        raise ValueError(f"{name}(...) has {len(items)} value{'s' * (len(items) != 1)}: write {FORMS[name]}")
    integer = name == "int"
    low, high = (_bound(text, integer) for text in items[:2])
    if len(items) == 2:
        return Number(low, high, integer, log=name == "log")
    option = items[2]
    step = re.fullmatch(r"step\s*=\s*(.+)", option)
    if integer and option == "log":
        return Number(low, high, integer, log=True)
    if step and name != "log":
        width = _bound(step[1], integer)
        return Number(low, high, integer, step=None if integer and width == 1 else width)
    hint = f"; for a log scale: {FORMS['log']}" if name == "uniform" and option == "log" else ""
    raise ValueError(f"unknown option {option} in {name}(...): write {FORMS[name]}{hint}")


def _bound(text: str, integer: bool) -> int | float:
    return whole(number(text)) if integer else float(number(text))


def _condition(rest: str) -> Comparison | None:
    if not rest:
        return None
    if not re.match(r"if\b", rest):
        raise ValueError(f"unexpected {rest}: only a condition can follow, such as `if optimizer == adamw`")
    return _comparison(rest[2:].strip())


def _comparison(text: str) -> Comparison:
    match = _COMPARISON.fullmatch(text)
    if match is None:
        raise ValueError(f"{text or 'nothing'} is not a condition: write `if key == value`, != or in [a, b]")
    key, operator, value = match[1], match[2].strip(), match[3].strip()
    if not operator.endswith("in"):
        if value[0] not in "'\"" and _SEVERAL.search(value):
            raise ValueError(
                f"{text} is more than one comparison: write one, `if {key} {operator} value`; "
                "put the value in quotes if it is a text like this"
            )
        return Comparison(key, (plain(value),), negated=operator == "!=")
    items, rest = bracketed(value) if value[0] in "[(" else ([], value)
    if rest or not items:
        raise ValueError(f"{value} is not a list of values: write `if {key} in [a, b]`")
    return Comparison(key, tuple(map(plain, items)), negated=operator.startswith("not"))
