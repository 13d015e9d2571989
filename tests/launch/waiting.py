"""A recipe for jobs: an attempt waits at a step until it is told to stop; the last goes on to the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import stoker
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    batch_size: int = 16
    steps: int = 60
    waits: list[int] = field(default_factory=list)
    """The step at which the first attempt waits, the second, and so on."""
    note: str = ""
    seed: int = 0


def train(run: stoker.Run, config: Config) -> None:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    trainer = stoker.Trainer(
        run,
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        loss=lambda output, batch: (mse_loss(output[:, 0], batch[1], reduction="sum"), len(batch[1])),
        training=config,
    )
    loader = trainer.loader(TensorDataset(x, x.sum(1)), batch_size=config.batch_size)
    waits = config.waits[run.attempt.number - 1] if run.attempt.number <= len(config.waits) else None
    for batch in trainer.steps(loader, max_steps=config.steps):
        run.log(loss=trainer.step(batch))
        while run.step + 1 == waits and run.attempt.stop.requested is None:
            time.sleep(0.02)
