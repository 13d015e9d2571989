"""Types of keys that the recipes share; nothing here loads torch."""

from __future__ import annotations

import re
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator
from stoker import config
from stoker.duration import Duration


def _parts(value: Any) -> Any:
    """`0.9,0.95`, as it stands on a command line, as its parts."""
    return value.strip("()").split(",") if isinstance(value, str) else value


def _steps_or_share(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError("below 1 it is a share of the steps, and from 1 on a whole number of them")
    return value


def _counted(value: Duration) -> Duration:
    if value.seconds is not None:
        raise ValueError(
            f"{value} is by the clock, which differs between machines: count in steps, ep or tok"
        )
    return value


def _joined(value: Any) -> Any:
    """Names in a list as one text: `a,b`."""
    value = config.unwritten(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)
    if isinstance(value, list):
        raise ValueError("give each as a text, as in [one, other]")
    return value


def _weighted(value: Any) -> Any:
    """Names with weights as one text: `a:3,b:1`; else as they are."""
    value = config.unwritten(value)
    if isinstance(value, dict) and all(isinstance(weight, int | float) for weight in value.values()):
        return ",".join(f"{name}:{weight}" for name, weight in value.items())
    if isinstance(value, dict):
        raise ValueError("give each a weight, as in {one: 3, other: 1}")
    return _joined(value)


def _patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern} is no regular expression: {error}") from error
    return value


Beta = Annotated[float, Ge(0), Lt(1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_parts)]
"""Two numbers: `0.9,0.95`, or a list."""
Warmup = Annotated[float, Ge(0), AfterValidator(_steps_or_share)]
"""Below 1 a share of the steps, from 1 on their number."""
Length = Annotated[Duration, AfterValidator(_counted)]
"""Of training, the same on every machine: `100`, `2ep`, `1000000tok`."""
Names = Annotated[str, BeforeValidator(_joined)]
"""Names joined by commas, or a list of them: `q_proj,v_proj`."""
Weighted = Annotated[str, BeforeValidator(_weighted)]
"""As names; or with weights: `a:3,b:1`, or a mapping of them."""
Patterns = Annotated[tuple[str, ...], AfterValidator(_patterns)]
"""Regular expressions."""
