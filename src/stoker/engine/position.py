"""The position of a run: what a checkpoint records of a loop, and where resuming continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker.run import journal


@dataclass
class Position:
    """The position between two steps."""

    step: int = 0
    samples: int = 0
    tokens: float | None = 0.0
    """The tokens of the steps done, at the mean of each step's data; None in a checkpoint that lacks it."""
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """The values of metrics that early stopping has seen, with their steps."""
    ended: dict[int, int] = field(default_factory=dict)
    """The step at which a loop was ended early, by its planned number of steps."""
    left: dict[int, int] = field(default_factory=dict)
    """The step at which a loop was left that another one followed, by its number in the script, from 1."""
    behind: set[int] = field(default_factory=set)
    """The loops of the script, by number, after which another one has begun."""
    began: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    """The steps, samples and tokens done when a loop began that counts from there, by its number."""
    data: Any = None
    """The position in the data, see `Loader.place`."""
    chosen: dict[int, str] = field(default_factory=dict)
    """The fingerprint of the data of the loop under way, by its number."""

    def move(self, samples: int, tokens: float) -> None:
        """Record a step over this many samples and tokens."""
        self.step += 1
        self.samples += samples
        self.tokens = (self.tokens or 0.0) + tokens

    def begin(self, loop: int) -> tuple[int, int, float]:
        """The steps, samples and tokens done when a loop began, which is now unless it began earlier."""
        return self.began.setdefault(loop, (self.step, self.samples, self.tokens or 0.0))

    def end(self, total: int) -> int:
        """Make the current step the last of a loop of `total` steps; returns that step."""
        self.ended[total] = self.step + 1
        return self.step + 1

    def written(self) -> dict[str, Any]:
        """The position as JSON values."""
        return {
            "step": self.step, "samples": self.samples, "tokens": self.tokens,
            "ended": list(self.ended.items()),
            "left": list(self.left.items()), "behind": sorted(self.behind), "data": self.data,
            "began": [(loop, *at) for loop, at in self.began.items()],
            "chosen": list(self.chosen.items()),
            "history": {n: [(s, journal.encode(v)) for s, v in seen] for n, seen in self.history.items()},
        }  # fmt: skip


def read(saved: Mapping[str, Any]) -> Position:
    """Read what `written` returned. Old checkpoints lack tokens, how loops ended, and where data go on."""
    return Position(
        step=saved["step"],
        samples=saved["samples"],
        tokens=saved.get("tokens"),
        history={n: [(s, journal.decode(v)) for s, v in seen] for n, seen in saved["history"].items()},
        ended=dict(saved.get("ended", ())),
        left=dict(saved.get("left", ())),
        behind=set(saved.get("behind", ())),
        began={loop: (step, samples, sum(rest)) for loop, step, samples, *rest in saved.get("began", ())},
        data=saved.get("data"),
        chosen=dict(saved.get("chosen", ())),
    )
