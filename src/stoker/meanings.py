"""Descriptions of config keys: the docstrings under the fields, read from the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any


def is_group(kind: Any) -> bool:
    """Whether a field of this type is a group of keys; not if its own `parse` reads it from one value."""
    return dataclasses.is_dataclass(kind) and isinstance(kind, type) and not hasattr(kind, "parse")


def meanings_of(config: type, prefix: str = "") -> dict[str, str]:
    """The docstring of each field of a config, inherited ones included, by dotted key."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if dataclasses.is_dataclass(cls):
            found.update({prefix + name: text for name, text in _documented(cls).items()})
    for name, kind in typing.get_type_hints(config).items():
        if is_group(kind):
            default = getattr(config, name, None)
            of = type(default) if isinstance(default, kind) else kind  # may inherit from the annotated one
            found.update(meanings_of(of, f"{prefix}{name}."))
    return found


def _documented(cls: type) -> dict[str, str]:
    """The fields of a class with the docstrings under them, read from its source."""
    module = ast.parse(Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8"))
    body = next(
        (n.body for n in ast.walk(module) if isinstance(n, ast.ClassDef) and n.name == cls.__name__), []
    )
    found: dict[str, str] = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[statement.target.id] = " ".join(str(after.value.value).split())
    return found
