"""Training with 8-bit states, of weights that are large enough for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from stoker import Run, Trainer, Training, tensors
from stoker.engine import optimizers
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """On two ranks 65 rows are uneven: one rank has 8-bit states of them, the other has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 65)
        self.scale = nn.Parameter(torch.ones(64 * 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        scaled = (hidden[:, :, None] * self.scale.view(1, 128, 64)).mean(-1)
        return self.last(scaled)  # type: ignore[no-any-return]


Trained: TypeAlias = tuple[list[float], dict[str, str]]
"""The losses of the steps that a start makes, and the kind of each state."""


def train(runs: Path, settings: dict[str, Any], *starts: tuple[str, int]) -> list[Trained]:
    """What becomes of several starts, each of a run up to a step."""
    torch.compiler.set_stance("force_eager")  # it takes long to compile, for each shape
    return [_train(runs, settings, *start) for start in starts]


def _train(runs: Path, settings: dict[str, Any], name: str, steps: int) -> Trained:
    torch.manual_seed(0)
    drawn = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 64, generator=drawn), torch.randn(64, 65, generator=drawn))
    with Run("test", name, runs=runs) as run:
        model = Net()
        names = list(dict(model.named_parameters()))
        trainer = Trainer(
            run, model, optimizer=optimizers.factory("adamw8bit", lr=1e-2),
            inputs=lambda batch: (batch[0],), training=Training(precision="fp32", **settings),
            loss=lambda output, batch: ((output - batch[1]).square().sum(), batch[1].numel()),
        )  # fmt: skip
        losses = []
        for batch in trainer.steps(trainer.loader(data, batch_size=8), max_steps=steps):
            losses.append(float(trainer.step(batch)))
            run.log(loss=losses[-1])
    of = {p: n for n, p in zip(names, trainer.model.parameters(), strict=True)}
    kinds = {
        of[p]: type(tensors.local(state["exp_avg"])).__name__ for p, state in trainer.optimizer.state.items()
    }
    return losses, kinds
