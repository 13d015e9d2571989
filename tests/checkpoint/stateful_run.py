"""What the ranks of test_stateful.py do: train a little, with states of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stoker import Run, Trainer, Training
from torch import nn
from torch.utils.data import TensorDataset


class Kept:
    """A state that is what it was given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def trainer_of(run: Run, model: nn.Module | None = None, **settings: Any) -> Trainer:
    """A trainer of a small model."""
    return Trainer(
        run, model or nn.Linear(2, 4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss=lambda output, batch: (output.sum(), len(output)),
        training=Training(precision="fp32", **settings),
    )  # fmt: skip


def train(folder: Path, steps: int, **settings: Any) -> dict[str, Any]:
    """The states as they are found, after registering; then the run goes on, and they are changed."""
    with Run("test", "a", runs=folder / "runs") as run:
        trainer = trainer_of(run, **settings)
        rank = run.world.rank
        same, own = Kept({"w": torch.zeros(3), "n": 0}), Kept({"w": torch.zeros(1), "seen": []})
        trainer.register_for_checkpointing(same=same, own=own)
        if rank == 0:
            alone = Kept((0,))
            trainer.register_for_checkpointing(alone=alone)
        found = {"same": same.state, "own": own.state}
        data = TensorDataset(torch.ones(24, 2))
        for batch in trainer.steps(trainer.loader(data, batch_size=12), max_steps=steps):
            trainer.step(batch)
            same.state = {"w": torch.tensor([1.0, 2.0, steps]), "n": steps}
            own.state = {"w": torch.full((rank + 1,), float(rank)), "seen": [rank] * rank}
    return found
