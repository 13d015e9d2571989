"""The toy problem of the PBT paper (Jaderberg et al. 2017, figure 2): neither fixed setting solves it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import stoker
import torch
from torch import nn
from torch.utils.data import TensorDataset


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    """Keys of the recipe; it climbs 1.2 - h0 a^2 - h1 b^2, and 1.2 - a^2 - b^2 is what counts."""

    h0: float = 1.0
    h1: float = 0.0
    steps: int = 80
    epochs: float | None = None
    """Instead of steps."""
    batch_size: int = 4
    pause: float = 0.0
    until: str = ""
    """It pauses no more once this file is there."""
    hangs: float = 2.0
    """From step 20 on, where h0 is at least so much."""
    seed: int = 0


class Point(nn.Module):
    """Where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([0.9, 0.8]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.place.expand(len(x), 2)


def train(run: stoker.Run, config: Config) -> None:
    """Climb."""
    weights = torch.tensor([config.h0, config.h1])
    trainer = stoker.Trainer(
        run, Point(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
        loss=lambda output, batch: ((weights * output**2).sum(), len(batch[0])), training=config,
    )  # fmt: skip
    run.goal(score="max")
    data = TensorDataset(torch.zeros(64, 1), torch.arange(64))
    length = {"max_steps": config.steps} if config.epochs is None else {"epochs": config.epochs}
    for batch in trainer.steps(trainer.loader(data, batch_size=config.batch_size), **length):
        if run.step == 20 and config.h0 >= config.hangs:
            time.sleep(600)
        loss = trainer.step(batch)
        point = trainer.model.state_dict()["place"]
        run.log(loss=loss, score=1.2 - float((point**2).sum()), first=int(batch[1][0]))
        if not (config.until and Path(config.until).exists()):
            time.sleep(config.pause)
