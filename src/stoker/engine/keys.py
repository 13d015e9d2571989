"""Types of keys that the recipes share; nothing here loads torch."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator
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


Beta = Annotated[float, Ge(0), Lt(1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_parts)]
"""Two numbers: `0.9,0.95`, or a list."""
Warmup = Annotated[float, Ge(0), AfterValidator(_steps_or_share)]
"""Below 1 a share of the steps, from 1 on their number."""
Length = Annotated[Duration, AfterValidator(_counted)]
"""Of training, the same on every machine: `100`, `2ep`, `1000000tok`."""
