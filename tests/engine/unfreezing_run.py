"""What the ranks of tests/engine/test_unfreezing.py do: train a model of which not all is always trained."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from stoker import Run, StokerError, Trainer, Training
from stoker.engine.random_state import seed_everything
from strategies_run import built
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

Weights = dict[str, torch.Tensor]

STEPS, TURNS_AT = 8, 4


def dataset() -> TensorDataset:
    made = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 6, generator=made), torch.randint(0, 3, (40,), generator=made))


def _model() -> nn.Sequential:
    seed_everything(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def _turned(model: nn.Module, way: str) -> list[nn.Parameter]:
    """The parameters that are frozen at first."""
    of_ways = {"biases": ("0.bias", "2.bias", "4.bias"), "a bias": ("0.bias",)}
    turned = of_ways.get(way, ("0.weight", "0.bias"))
    return [p for name, p in model.named_parameters() if name in turned]


def freeze_apart(folder: Path) -> str:
    """What is said where each of two ranks freezes another layer, of the same shape."""
    model = _model()
    with Run("test", "apart", runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=loss,
            training=Training(precision="fp32", parallel="ddp"),
        )  # fmt: skip
        try:
            for batch in trainer.steps(trainer.loader(dataset(), batch_size=8), max_steps=3):
                if run.step == 2:
                    model[2].bias.requires_grad_(run.world.rank == 0)
                    model[0].bias.requires_grad_(run.world.rank == 1)
                trainer.step(batch)
        except StokerError as error:
            return str(error)
    return ""


def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return cross_entropy(output, batch[1], reduction="sum"), len(batch[1])


def train(
    folder: Path, name: str, way: str, settings: dict[str, Any], *, die_at: int | None = None
) -> tuple[Weights, Weights]:
    """The weights after some steps, and their averages.

    `way`: "one loop" unfreezes the first layer in the middle of it, "in turn" also freezes the last one then,
    "two loops" unfreezes the first layer between them, "a bias" that of the first layer, and "biases" those
    of all layers. `die_at`: every rank kills itself in the middle of that step.
    """
    warnings.simplefilter("ignore")
    model, loops = _model(), way in ("two loops", "a bias", "biases")
    for p in _turned(model, way):
        p.requires_grad_(False)

    def make(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        chosen = trained if loops else model.parameters()
        return torch.optim.SGD(chosen, lr=0.1, momentum=0.9)

    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=make, loss=loss,
            training=Training(**{"precision": "fp32", "checkpoint_every": 1, **built(settings)}),
        )  # fmt: skip
        loader = trainer.loader(dataset(), batch_size=8, shuffle=False)
        for end in (TURNS_AT, STEPS) if loops else (STEPS,):
            for batch in trainer.steps(loader, max_steps=end):
                if run.step == die_at:
                    trainer._finish_saving()
                    os.kill(os.getpid(), signal.SIGKILL)
                if not loops and run.step == TURNS_AT + 1:
                    model[0].requires_grad_(True)
                    model[4].requires_grad_(way != "in turn")
                run.log(loss=trainer.step(batch))
            if loops and end == TURNS_AT:
                thawed = [p.requires_grad_(True) for p in _turned(trainer.model, way)]
                trainer.optimizer.add_param_group({"params": thawed})
        averages = trainer.state_dict()
        trainer._ema = None
        return trainer.state_dict(), averages


def plain(way: str, decay: float) -> tuple[Weights, Weights]:
    """The same in plain PyTorch."""
    model, x, y = _model(), *dataset().tensors
    for p in _turned(model, way):
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(STEPS):
        if step == TURNS_AT:
            model.requires_grad_(True)
            model[4].requires_grad_(way != "in turn")
        at = slice(8 * step % 40, 8 * step % 40 + 8)
        optimizer.zero_grad()
        cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach(), 1 - decay)
    return {n: p.detach() for n, p in model.named_parameters()}, averages


class Coder(nn.Module):
    """An encoder and a decoder, each with an optimizer, and one loss."""

    def __init__(self) -> None:
        super().__init__()
        seed_everything(0)
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x).tanh())  # type: ignore[no-any-return]

    def optimizers(self) -> dict[str, Any]:
        return {
            "encoder": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "decoder": lambda p: torch.optim.Adam(p, lr=0.01),
        }


def train_together(folder: Path, settings: dict[str, Any], clip: float) -> tuple[Weights, Weights]:
    """The weights after some steps of two optimizers with the gradients of one loss, and their averages."""
    model = Coder()
    with Run("test", "together", runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=model.optimizers(),
            training=Training(**{"precision": "fp32", "clip_norm": clip, **built(settings)}),
        )  # fmt: skip
        loader = trainer.loader(dataset(), batch_size=8, shuffle=False)
        for batch in trainer.steps(loader, max_steps=STEPS):
            for part in trainer.micro(batch):
                trainer.backward(*loss(trainer.forward(part), part))
            trainer.update(*trainer.optimizers.values())
        averages = trainer.state_dict()
        trainer._ema = None
        return trainer.state_dict(), averages


def plain_together(clip: float, decay: float) -> tuple[Weights, Weights]:
    """The same in plain PyTorch."""
    model, x, y = Coder(), *dataset().tensors
    optimizers = [make(model.get_submodule(name).parameters()) for name, make in model.optimizers().items()]
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(STEPS):
        at = slice(8 * step % 40, 8 * step % 40 + 8)
        model.zero_grad()
        cross_entropy(model(x[at]), y[at]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach(), 1 - decay)
    return {n: p.detach() for n, p in model.named_parameters()}, averages


def leaves_out(folder: Path) -> str:
    """What is said of a model that is frozen behind the Trainer, and of which a layer has no part."""
    model = nn.ModuleDict({"first": nn.Linear(6, 3), "used": nn.Linear(6, 3), "spare": nn.Linear(6, 3)})
    with Run("test", "unused", runs=folder) as run:
        trainer = Trainer(
            run, _Chosen(model), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=loss,
            training=Training(precision="fp32"),
        )  # fmt: skip
        model["first"].requires_grad_(False)
        try:
            for batch in trainer.steps(trainer.loader(dataset(), batch_size=8), max_steps=1):
                trainer.step(batch)
        except StokerError as error:
            return str(error)
    return ""


class _Chosen(nn.Module):
    def __init__(self, of: nn.ModuleDict) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of["used"](x)  # type: ignore[no-any-return]
