"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: State
    """A problem makes some training fail or lose what it has done; a note is worth knowing."""
    text: str
    """In a sentence; of a problem also what to do."""


def ok(text: str) -> Finding:
    """All is well."""
    return Finding("ok", text)


def note(text: str) -> Finding:
    """Something to know."""
    return Finding("note", text)


def problem(text: str) -> Finding:
    """Something that will go wrong, with what to do."""
    return Finding("problem", text)


def said(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
