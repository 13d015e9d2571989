"""Counts, sizes, paths, values and lists of names as text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)
_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def counted(number: int, what: str) -> str:
    """A number with its noun: `1 node`, `12,000 tokens`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names, and the number of the others: `a.py, b.py and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named(value: object) -> str:
    """A value for a message: a function or class by its name, anything else by its type."""
    name = getattr(value, "__qualname__", None)
    return f"{name}" if callable(value) and name else f"an object of type {type(value).__name__}"


def shortest(path: Path) -> str:
    """A path from the current folder if it is below it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def size(count: float) -> str:
    """A size in bytes with a binary unit: `734 B`, `1.5 KiB`, `62.1 GiB`."""
    for unit, factor in _UNITS.items():
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} B"


def parsed_size(text: str) -> int:
    """The bytes of `64GB`, `512M` or `1.5TiB`, in powers of 1024 as memory is sold; 0 if it is not a size."""
    match = _SIZE.fullmatch(text.strip())
    return round(float(match[1]) * _UNITS[f"{match[2].upper()}iB"]) if match else 0
