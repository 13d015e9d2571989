"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    state: State
    """A problem makes some training fail or lose its work; a note is worth knowing."""
    text: str
    """One sentence; for a problem, including what to do."""


def ok(text: str) -> Finding:
    """Everything is fine."""
    return Finding("ok", text)


def note(text: str) -> Finding:
    """Something to know."""
    return Finding("note", text)


def problem(text: str) -> Finding:
    """Something that will go wrong, with what to do."""
    return Finding("problem", text)


def said(error: BaseException) -> str:
    """An error's message, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
