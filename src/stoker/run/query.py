"""Queries over runs: `val_loss < 0.3 and lr > 1e-4`.

The syntax is Python's: and, or, not, comparisons, `in`, numbers, strings in quotes, and
parentheses. A name is a metric (its latest value), a config key or param, a tag, or one of
`id`, `experiment`, `status`, `step`, `started`, `seconds`; the prefix `metrics.`, `config.` or
`tags.` makes it unambiguous. A name with characters other than letters, digits, `_` and `.`
must be in backticks. `best(m)`, `min(m)`, `max(m)` and `last(m)` are summaries of a metric.
A comparison with something that a run does not have is false.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stoker.errors import BadInput, nearest
from stoker.run.series import Summary
from stoker.run.state import RunView

Facts = Mapping[str, Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_OF_TEXTS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
_SUMMARIES = ("last", "best", "min", "max")
_QUOTED = re.compile(r"`([^`]+)`")
_MISSING = object()


class Query:
    """A query that is true or false for a run. Raises BadInput if it cannot be parsed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._quoted: dict[str, str] = {}
        self._root = self._parsed(text)
        self.names = list(dict.fromkeys(self._names(self._root)))
        """The names that the query uses."""
        self._check(self._root)

    def matches(self, facts: Facts) -> bool:
        """Whether the query is true for a run."""
        return bool(self._truth(self._root, facts))

    def value(self, facts: Facts) -> Any:
        """The value of a query that is a name or a call such as `best(name)`; None if the run has none."""
        found = self._value(self._root, facts)
        return None if found is _MISSING else found

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse a name that no run has. Raises BadInput."""
        allowed = set(known)
        for name in self.names:
            if name not in allowed:
                plain = name.partition("(")[2].rstrip(")") or name
                text = f"; a text is in quotes, '{plain}'"
                hint = text if self._is_compared(name) else nearest(plain, allowed)
                raise BadInput(f"no run has a metric, config key or tag {plain!r}{hint}")

    def _is_compared(self, name: str) -> bool:
        """Whether a name stands where a text is expected: to the right of ==, !=, `in` or `not in`."""
        for node in ast.walk(self._root):
            if isinstance(node, ast.Compare):
                for op, right in zip(node.ops, node.comparators, strict=True):
                    parts = right.elts if isinstance(right, ast.List | ast.Tuple) else [right]
                    if isinstance(op, _OF_TEXTS) and name in map(self._name, parts):
                        return True
        return False

    def _parsed(self, text: str) -> ast.expr:
        def stand_in(match: re.Match[str]) -> str:
            self._quoted[f"quoted_{len(self._quoted)}_"] = match[1]
            return f"quoted_{len(self._quoted) - 1}_"

        try:
            return ast.parse(_QUOTED.sub(stand_in, text).strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            alone = re.search(r"(?<![<>=!])=(?!=)", text)
            hint = ": write == to compare" if alone else f": {getattr(error, 'msg', error)}"
            raise BadInput(
                f"{text!r} cannot be read{hint}; write e.g. 'val_loss < 0.3 and lr > 1e-4', and a name with "
                "other characters in backticks, such as `top-5 %`"
            ) from None

    def _check(self, node: ast.expr) -> None:
        """Check that a query uses only names, constants, comparisons, and, or, not. Raises BadInput."""
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self._check(part)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                self._value(part, {})
            if not all(type(op) in _COMPARE for op in node.ops):
                raise self._unreadable(node)
        else:
            self._value(node, {})

    def _truth(self, node: ast.expr, facts: Facts) -> bool:
        if isinstance(node, ast.BoolOp):
            combine = all if isinstance(node.op, ast.And) else any
            return combine(self._truth(part, facts) for part in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._truth(node.operand, facts)
        if isinstance(node, ast.Compare):
            values = [self._value(part, facts) for part in (node.left, *node.comparators)]
            pairs = zip(node.ops, values, values[1:], strict=False)
            return all(_compare(op, left, right) for op, left, right in pairs)
        found = self._value(node, facts)
        return found is not _MISSING and bool(found)

    def _value(self, node: ast.expr, facts: Facts) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = self._value(node.operand, facts)
            return -operand if isinstance(operand, int | float) else _MISSING
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(part, facts) for part in node.elts]
        name = self._name(node)
        if name is None:
            raise self._unreadable(node)
        return facts.get(name, _MISSING)

    def _name(self, node: ast.AST) -> str | None:
        """The name of a fact: plain, dotted, in backticks, or `best(...)` of one."""
        if isinstance(node, ast.Name):
            return self._quoted.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self._name(node.value)
            return None if before is None else f"{before}.{self._quoted.get(node.attr, node.attr)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SUMMARIES:
            inner = self._name(node.args[0]) if len(node.args) == 1 and not node.keywords else None
            return None if inner is None else f"{node.func.id}({inner})"
        return None

    def _names(self, node: ast.AST) -> Iterable[str]:
        name = self._name(node)
        if name is not None:
            yield name
        else:
            for child in ast.iter_child_nodes(node):
                yield from self._names(child)

    def _unreadable(self, node: ast.expr) -> BadInput:
        return BadInput(
            f"{self._text!r} cannot be read at {self._written(node)!r}: it is neither a name nor a number; a "
            "name with other characters than letters, digits, _ and . is in backticks, such as `loss/train`"
        )

    def _written(self, node: ast.expr) -> str:
        """A part of the query as it was written."""

        def quoted(stand_in: re.Match[str]) -> str:
            return f"`{self._quoted[stand_in[0]]}`" if stand_in[0] in self._quoted else stand_in[0]

        return re.sub(r"quoted_\d+_", quoted, ast.unparse(node))


def facts(view: RunView) -> dict[str, Any]:
    """Everything that can be queried about a run, by name. A plain name is a metric before a config key."""
    summaries = view.summary()
    groups: dict[str, Mapping[str, Any]] = {
        "tags": view.tags,
        "config": {**view.config, **view.params},
        "metrics": view.newest(),
    }
    found: dict[str, Any] = {}
    for group, values in groups.items():
        found.update(values)
        found.update({f"{group}.{name}": value for name, value in values.items()})
    for name, summary in summaries.items():
        for which, value in _summary_facts(summary).items():
            found.update({f"{which}({name})": value, f"{which}(metrics.{name})": value})
    return {
        **found,
        "id": view.directory.id, "experiment": view.directory.experiment, "status": view.status,
        "step": view.step, "started": view.started, "seconds": view.seconds,
    }  # fmt: skip


def _summary_facts(summary: Summary) -> dict[str, float]:
    found = {name: getattr(summary, name) for name in _SUMMARIES}
    return {name: value for name, value in found.items() if value is not None}


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if left is _MISSING or right is _MISSING:
        return False
    try:
        return bool(_COMPARE[type(op)](left, right))
    except TypeError:  # a text and a number
        return False
