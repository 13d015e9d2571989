"""A recipe of its own that the tests start on several ranks."""

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import stoker
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    batch_size: int = 16
    steps: int = 60
    pause: float = 0.0
    pause_from: int = 0
    until: str = ""
    """It pauses no more once this file is there."""
    workers: int = 0
    fail_rank: int = -1
    padding: int = 0
    """Characters more that it says then."""
    deaf_rank: int = -1
    nan_at: int = -1
    dropout: float = 0.1
    fits: int = -1
    """On rank 1 more samples than that run out of memory, from step 20 on."""
    told_in_class: int = 0
    """The signal that ranks receive while they create a class."""
    told_ranks: tuple[int, ...] = (0, 1)
    late: float = 0.0
    """Seconds until it begins."""
    seed: int = 0


class Told:
    """Receives a signal while a class is being created that has it as an attribute."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __set_name__(self, owner: type, name: str) -> None:
        signal.raise_signal(self.number)


class Small(nn.Module):
    """Passes on what fits, see `Config.fits`."""

    fits = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if 0 <= self.fits < len(x):
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB. 1 GiB is free.")
        return x


def train(run: stoker.Run, config: Config) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=made)
    torch.manual_seed(0)
    if config.told_in_class and run.world.rank in config.told_ranks:
        type("Built", (), {"told": Told(config.told_in_class)})
    time.sleep(config.late)
    small = Small()
    trainer = stoker.Trainer(
        run,
        nn.Sequential(small, nn.Linear(8, 32), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(32, 1)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        loss=lambda output, batch: (mse_loss(output[:, 0], batch[1], reduction="sum"), len(batch[1])),
        training=config,
    )
    loader = trainer.loader(TensorDataset(x, x.sum(1)), batch_size=config.batch_size, workers=config.workers)
    for batch in trainer.steps(loader, max_steps=config.steps):
        if run.world.rank == config.fail_rank and run.step == 20:
            said = "what one rank cannot do: its connection to a server, say"
            raise RuntimeError(said + "." * config.padding)
        if run.world.rank == config.deaf_rank and run.step == 20 and run.attempt.number == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if run.step == 20 and run.world.rank == 1:
            small.fits = config.fits
        if run.step == config.nan_at and run.world.rank == 0:
            batch[0][0] = math.nan
        run.log(loss=trainer.step(batch))
        if run.step >= config.pause_from and not (config.until and Path(config.until).exists()):
            time.sleep(config.pause)


if __name__ == "__main__":
    stoker.main(train)
