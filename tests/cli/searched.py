"""What the sweeps of tests/cli/test_sweep.py search: a function of two numbers, a value a step."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import stoker
from stoker.errors import BadInput


@dataclass(frozen=True)
class Config:
    """Keys of the recipe."""

    x: float = 0.0
    kind: Literal["near", "far"] = "near"
    steps: int = 9
    pause: float = 0.0
    until: str = ""
    """It pauses no more once this file is there."""
    fails: str = ""
    """raise, nan, exit, kill, hang: at step 3, where x is above a half; refuse: there, but at the start."""
    hang_limit: stoker.Duration | None = None
    seed: int = 0


def train(run: stoker.Run, config: Config) -> None:
    """Come nearer to (x - 0.3)^2 at each step; goes on where it was."""
    if config.fails == "refuse" and config.x > 0.5:
        raise BadInput("this cannot be trained on")
    for step in range(run.step + 1, config.steps + 1):
        if not (config.until and Path(config.until).exists()):
            time.sleep(config.pause)
        value = (config.x - 0.3) ** 2 + (1.0 if config.kind == "far" else 0.0) + 1.0 / step
        if step == 3 and config.x > 0.5:
            value = _fail(config.fails, value)
        run.log(loss=2 * value, cost=config.x, val_loss=value)  # a kill between two calls leaves a gap


def _fail(how: str, value: float) -> float:
    if how == "raise":
        raise RuntimeError("this one cannot be trained")
    if how == "nan":
        return float("nan")
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(600)
    if how == "kill":
        os.kill(os.getpid(), 9)
    return value
