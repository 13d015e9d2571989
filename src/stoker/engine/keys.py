"""The config keys that recipes share: their types and checks; this module does not import torch."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator
from stoker import config
from stoker.duration import Duration

log = logging.getLogger("stoker")


def _parts(value: Any) -> Any:
    """Split `0.9,0.95`, as written on a command line, into its parts."""
    return value.strip("()").split(",") if isinstance(value, str) else value


def _steps_or_share(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError("must be a share of the steps (below 1) or a whole number of steps")
    return value


def _counted(value: Duration) -> Duration:
    if value.seconds is not None:
        raise ValueError(f"{value} is a time, which differs between machines: give steps, ep or tok")
    return value


def _joined(value: Any) -> Any:
    """Names in a list as one text: `a,b`."""
    value = config.unwritten(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    if isinstance(value, list):
        raise ValueError("every item must be a string, as in [one, other]")
    return value


def _weighted(value: Any) -> Any:
    """Names with weights as one text: `a:3,b:1`; anything else as `_joined` returns it."""
    value = config.unwritten(value)
    if isinstance(value, dict) and all(isinstance(weight, int | float) for weight in value.values()):
        return ",".join(f"{name}:{weight}" for name, weight in value.items())
    if isinstance(value, dict):
        raise ValueError("every name needs a weight, as in {one: 3, other: 1}")
    return _joined(value)


def check_length(max_steps: Duration | None, epochs: float | None) -> None:
    """Raises ValueError if the length of training is given twice."""
    if max_steps is not None and epochs is not None:
        raise ValueError(f"max_steps={max_steps} and epochs={epochs}: give only one of the two")


def warn_of_folder(size: str) -> None:
    """Warn if a model lies in a folder whose name is that of a size, which means a new model."""
    if Path(size, "config.json").is_file():
        log.warning(
            "model=%s is a new model of that size; the one in the folder of this name is model=./%s",
            size, size,
        )  # fmt: skip


def _patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern} is not a regular expression: {error}") from error
    return value


Beta = Annotated[float, Ge(0), Lt(1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_parts)]
"""Two numbers: `0.9,0.95`, or a list."""
Warmup = Annotated[float, Ge(0), AfterValidator(_steps_or_share)]
"""Below 1 a share of the steps, from 1 on a number of steps."""
Length = Annotated[Duration, AfterValidator(_counted)]
"""A length of training that is the same on every machine: `100`, `2ep`, `1000000tok`."""
Names = Annotated[str, BeforeValidator(_joined)]
"""Comma-separated names, or a list of them: `q_proj,v_proj`."""
Weighted = Annotated[str, BeforeValidator(_weighted)]
"""As `Names`, or with weights: `a:3,b:1`, or a mapping from names to weights."""
Patterns = Annotated[tuple[str, ...], AfterValidator(_patterns)]
"""Regular expressions."""
