"""What the ranks of test_chosen.py do: draw a subset for each loop."""

from __future__ import annotations

from pathlib import Path

import torch
from stoker import Run, Trainer, Training
from torch import nn
from torch.utils.data import Subset, TensorDataset


def train(folder: Path, *, seeded: bool) -> int:
    """Two loops, each over a subset that is drawn for it; returns the steps."""
    with Run("test", "a", runs=folder) as run:
        trainer = Trainer(
            run, nn.Linear(2, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss=lambda output, batch: (output.sum(), len(output)), training=Training(precision="fp32"),
        )  # fmt: skip
        for epoch in range(2):
            draws = torch.Generator().manual_seed(epoch) if seeded else None
            picked = torch.randperm(16, generator=draws)[:8].tolist()
            loader = trainer.loader(Subset(TensorDataset(torch.ones(16, 2)), picked), batch_size=4)
            for batch in trainer.steps(loader, epochs=epoch + 1):
                trainer.step(batch)
        return trainer.steps_done
