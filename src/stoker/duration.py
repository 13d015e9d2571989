"""Durations with units: `100` (steps), `2ep`, `1000000tok`, `5000samples`, `10min`.

A duration in steps, samples, epochs or tokens refers to the training itself, so it is the same on every
machine. One in seconds is not, so only checkpoints, which do not affect the result, may be scheduled by the
clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic_core import core_schema
from stoker.errors import BadInput

_UNITS = {
    "": "step", "step": "step", "steps": "step",
    "ep": "epoch", "epoch": "epoch", "epochs": "epoch",
    "tok": "token", "token": "token", "tokens": "token",
    "sample": "sample", "samples": "sample",
    "s": "second", "min": "minute", "h": "hour",
}  # fmt: skip
_SHORT = {
    "step": "", "epoch": "ep", "token": "tok", "sample": "samples",
    "second": "s", "minute": "min", "hour": "h", "percent": "%",
}  # fmt: skip
_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0}
COUNTED = ("step", "sample", "token", "epoch")
"""Units that refer to the training itself."""
_WHOLE = ("step", "token", "sample")
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)")
_CLOCKS = [
    re.compile(pattern)
    for pattern in (
        r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?",
        r"()(\d+):([0-5]\d):([0-5]\d)",
        r"(\d+)-(\d\d?)(?::([0-5]\d)(?::([0-5]\d))?)?",
    )
]
"""Days, hours, minutes and seconds: as they are written here, and as Slurm writes them."""
_CLOCK_UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def clock(text: str) -> float:
    """`3h55m`, `90min`, `1d12h`, `30s`, or Slurm's `4:00:00` and `1-12`, in seconds. Raises ValueError."""
    plain = text.strip().lower().replace(" ", "")
    match = next(filter(None, (pattern.fullmatch(plain) for pattern in _CLOCKS)), None)
    parts = [int(part or 0) for part in match.groups()] if match else [0] * 4
    seconds = sum(part * unit for part, unit in zip(parts, _CLOCK_UNITS.values(), strict=True))
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a length of time: give one such as 3h55m, 90min or 1d12h")
    return float(seconds)


def shown_clock(seconds: float) -> str:
    """Seconds as `clock` reads them: `3h55min`, `1d12h`."""
    rest, found = round(seconds), ""
    for name, unit in _CLOCK_UNITS.items():
        count, rest = divmod(rest, unit)
        found += f"{count}{name}" if count else ""
    return found


def limit(option: str, text: str) -> float:
    """Like `clock`, for an option that limits a time. Raises BadInput, which names the option."""
    try:
        return clock(text)
    except ValueError as error:
        raise BadInput(f"{option} {error}") from error


def of_a_step(
    unit: str, *, samples: float | None, tokens: float | None, samples_per_epoch: float | None
) -> float | None:
    """How much of a unit one step is; None if unknown.

    Args:
        unit: one of `COUNTED`.
        samples: per global batch.
        tokens: per global batch.
    """
    if unit == "step":
        return 1.0
    if unit == "epoch":
        return samples / samples_per_epoch if samples and samples_per_epoch else None
    return samples if unit == "sample" else tokens


@dataclass(frozen=True)
class Duration:
    """An amount of training: `count` of `unit` (step, epoch, token, sample, second, minute, hour)."""

    count: float
    unit: str

    ALLOWED: ClassVar[str] = "100 (steps), 2ep, 1000000tok, 5000samples, or by the clock 30s, 10min, 2h"

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Read `100`, `"2ep"`, `"1_000_000tok"`, `"10min"`. Raises ValueError on anything else."""
        if isinstance(value, Duration):
            return value
        match = _PATTERN.fullmatch(str(value).strip().lower()) if not isinstance(value, bool) else None
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"{value!r} is not a duration: give {cls.ALLOWED}")
        count, unit = float(match[1].replace("_", "")), _UNITS[match[2]]
        if count <= 0:
            raise ValueError(f"{value!r} is not a duration: it must be more than 0")
        if unit in _WHOLE and count != int(count):
            raise ValueError(f"{value!r} is not a duration: give a whole number of {unit}s")
        return cls(count, unit)

    @property
    def seconds(self) -> float | None:
        """The duration in seconds; None for one in steps, samples, epochs or tokens."""
        return self.count * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def __str__(self) -> str:
        count = int(self.count) if self.count == int(self.count) else self.count
        return f"{count}{_SHORT[self.unit]}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema()
        )
