"""What the ranks of test_copies.py do: train a little, so that their weights come apart, or do not."""

from __future__ import annotations

from pathlib import Path

import torch
from stateful_run import trainer_of
from stoker import Run, StokerError
from torch.utils.data import TensorDataset


def train(folder: Path, how: str, **settings: object) -> str:
    """What it was ended with."""
    made = torch.Generator().manual_seed(0)
    try:
        with Run("test", how, runs=folder / "runs") as run:
            model = torch.nn.Linear(2, 4)
            if how == "buffer":
                model.register_buffer("center", torch.zeros(2))
                model.register_buffer("mask", torch.full((2,), -torch.inf))
            trainer = trainer_of(run, model, **settings)
            weight = trainer.model.weight
            loader = trainer.loader(TensorDataset(torch.randn(24, 2, generator=made)), batch_size=12)
            for batch in trainer.steps(loader, max_steps=2):
                loss = trainer.forward(batch).square().sum()
                if how == "buffer":
                    trainer.model.center.lerp_(batch[0].mean(0), 0.1)
                if how == "frozen":
                    trainer.model.bias.requires_grad_(False).add_(run.world.rank)
                if how == "alone":
                    loss.backward()
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()
                    continue
                trainer.backward(loss, len(batch[0]))
                trainer.update()
                with torch.no_grad():
                    if how == "drawn":
                        weight.add_(torch.randn_like(weight) * 0.1)
                    if how == "rounding":
                        weight.mul_(1 + 1e-3 * run.world.rank)
    except StokerError as error:
        return str(error)
    return ""
