"""How far a run is: what a checkpoint says of a loop, and whoever resumes it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker.run import journal


@dataclass
class Position:
    """Between two steps."""

    step: int = 0
    samples: int = 0
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """The values of metrics that early stopping has seen, with their steps."""
    ended: dict[int, int] = field(default_factory=dict)
    """The step that a loop was ended with, by how many it was to have."""
    data: Any = None
    """Where the data are, see `Loader.place`."""

    def move(self, samples: int) -> None:
        """A step of so many samples is done."""
        self.step += 1
        self.samples += samples

    def end(self, total: int) -> int:
        """Have the step under way be the last of a loop of so many; which one that is."""
        self.ended[total] = self.step + 1
        return self.step + 1

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step, "samples": self.samples, "ended": list(self.ended.items()), "data": self.data,
            "history": {n: [(s, journal.encode(v)) for s, v in seen] for n, seen in self.history.items()},
        }  # fmt: skip


def read(saved: Mapping[str, Any]) -> Position:
    """What `written` gave. Checkpoints of old say neither that a loop was ended nor where its data were."""
    return Position(
        step=saved["step"],
        samples=saved["samples"],
        history={n: [(s, journal.decode(v)) for s, v in seen] for n, seen in saved["history"].items()},
        ended=dict(saved.get("ended", ())),
        data=saved.get("data"),
    )
