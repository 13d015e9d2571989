"""What tests call a command and how it ended, and what they plant as a secret."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        """The object that --json prints last."""
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found


Command = Callable[..., Done]
Start = Callable[..., Any]
Point = Callable[[str], None]
"""Has this process and what it starts ask a hub of some address."""
SECRET = uuid.uuid4().hex  # in no source file: those may stand in the run's record
