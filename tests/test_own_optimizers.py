"""Optimizers that do more than torch's, or are stepped by the script itself, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stoker import Run, StokerError, Trainer, Training
from stoker.engine.random_state import seed_everything
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

_made = torch.Generator().manual_seed(0)
ROWS = TensorDataset(torch.randn(32, 3, generator=_made), torch.randn(32, 1, generator=_made))
FP32 = Training(precision="fp32")


def _model() -> nn.Module:
    seed_everything(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def _loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return mse_loss(output, batch[1], reduction="sum"), len(batch[1])


def _open(folder: Path, name: str = "a") -> Run:
    return Run("test", name, runs=folder, seed=0)


def _trainer(run: Run, optimizer: Any, training: Training = FP32, **how: Any) -> Trainer:
    return Trainer(run, _model(), optimizer=optimizer, training=training, loss=_loss, **how)


def _batches() -> list[Any]:
    return [[t[at : at + 8] for t in ROWS.tensors] for at in range(0, 32, 8)]


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def _perturb(model: nn.Module, sign: float) -> None:
    """By the sign of the gradients, as an ascent step does; then back."""
    for parameter in model.parameters():
        if sign > 0:
            parameter.by = 0.05 * parameter.grad.sign()  # type: ignore[attr-defined, union-attr]
        parameter.data.add_(parameter.by, alpha=sign)  # type: ignore[attr-defined]


def test_gradients_that_a_loop_clears_within_a_step_do_not_count(tmp_path: Path) -> None:
    """Sharpness-aware minimisation: the gradients of the first pass only say where to look."""
    model = _model()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    for batch in _batches():
        for sign in (1.0, -1.0):
            total, count = _loss(model(batch[0]), batch)
            plain.zero_grad()
            (total / count).backward()
            _perturb(model, sign)
        plain.step()
    with _open(tmp_path) as run:
        trainer = _trainer(run, lambda p: torch.optim.SGD(p, 0.1))
        loader = trainer.loader(ROWS, batch_size=8, shuffle=False)
        for batch in trainer.steps(loader, max_steps=4):
            for sign in (1.0, -1.0):
                trainer.optimizer.zero_grad()
                trainer.backward(*_loss(trainer.forward(batch), batch))
                _perturb(trainer.model, sign)
            trainer.update()
        torch.testing.assert_close(_weights(trainer.model), _weights(model))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=3, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_of_torch_gives_its_own_rates(name: str, as_tensor: bool, tmp_path: Path) -> None:
    """Also if the script has scaled the rate before: torch's schedulers begin with what they find."""

    def made(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, torch.tensor(0.1) if as_tensor else 0.1, foreach=False)

    def scaled(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 4
        return SCHEDULES[name](optimizer)

    plain = made(_model().parameters())
    falls = scaled(plain)
    expected = []
    for _ in range(4):
        expected.append(float(plain.param_groups[0]["lr"]))
        plain.step()
        falls.step()
    found = []
    with _open(tmp_path) as run:
        trainer = _trainer(run, made)
        scheduler = scaled(trainer.optimizer)
        trainer.register_for_checkpointing(scheduler=scheduler)
        for batch in trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=4):
            found.append(float(trainer.optimizer.param_groups[0]["lr"]))
            trainer.step(batch)
            scheduler.step()
    assert found == pytest.approx(expected)


class _Lookahead(torch.optim.SGD):
    """An optimizer around another one, which has the momentum."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.5)
        self.fast = torch.optim.SGD(self.param_groups, 0.1, momentum=0.9)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.fast.step()


class _Counted(torch.optim.SGD):
    """An optimizer that saves more than its `state`."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        self.param_groups[0]["lr"] = 0.1 / self.steps
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict.pop("steps")
        super().load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("made", "attribute", "at"),
    [(_Lookahead, "fast", "trainer.optimizer.fast"), (lambda p: _Counted(p, 0.1), "", "trainer.optimizer")],
)
def test_an_optimizer_with_more_state_is_warned_of_until_that_is_registered(
    made: Any, attribute: str, at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(name: str, steps: int, *, registers: bool) -> torch.Tensor:
        with _open(tmp_path, name) as run:
            trainer = _trainer(run, made)
            if registers:
                own = getattr(trainer.optimizer, attribute) if attribute else trainer.optimizer
                trainer.register_for_checkpointing(own=own)
            for batch in trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=steps):
                trainer.step(batch)
            return _weights(trainer.model)

    train("first", 1, registers=False)
    assert f"add trainer.register_for_checkpointing({at.rpartition('.')[2]}={at})" in caplog.text
    caplog.clear()
    whole = train("whole", 6, registers=True)
    train("cut", 3, registers=True)
    assert torch.equal(train("cut", 6, registers=True), whole)
    assert "has more state" not in caplog.text


class _Averaging(torch.optim.SGD):
    """An optimizer whose `state` has a value of no parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.state["steps"] = {"count": 1}  # type: ignore[index]


def test_state_of_no_parameter_is_said_to_have_no_place_in_a_checkpoint(tmp_path: Path) -> None:
    with _open(tmp_path) as run:
        trainer = _trainer(run, lambda p: _Averaging(p, 0.1))
        batches = trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=1)
        trainer.step(next(batches))
        with pytest.raises(StokerError, match=r"_Averaging.state has the key 'steps', .* param_groups$"):
            next(batches)


@pytest.mark.parametrize("registers", [False, True])
def test_an_optimizer_of_the_script_that_no_checkpoint_has_is_warned_of_once(
    registers: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _open(tmp_path) as run:
        model = _model()
        trainer = Trainer(
            run, model, optimizer={"0": lambda p: torch.optim.SGD(p, 0.1)}, training=FP32, loss=_loss
        )
        own = torch.optim.Adam(trainer.model[2].parameters(), 0.1)  # type: ignore[index]
        if registers:
            trainer.register_for_checkpointing(own=own)
        for batch in trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=4):
            trainer.backward(*_loss(trainer.forward(batch), batch))
            own.step()
            trainer.update()
    said = [one for one in caplog.messages if "that is none of the Trainer's" in one]
    assert len(said) == (0 if registers else 1)


@pytest.mark.parametrize(
    ("how", "left_out"),
    [
        ({"clip_norm": 0.1}, "clip_norm"),
        ({"schedule": lambda step, total: 0.5}, "schedule="),
        ({}, ""),
    ],
)
def test_a_step_without_the_trainer_is_refused_where_it_would_leave_something_out(
    how: dict[str, Any], left_out: str, tmp_path: Path
) -> None:
    with _open(tmp_path) as run:
        training = Training(precision="fp32", clip_norm=how.get("clip_norm"))
        trainer = _trainer(run, lambda p: torch.optim.SGD(p, 0.1), training, schedule=how.get("schedule"))
        for batch in trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=2):
            total, count = _loss(trainer.forward(batch), batch)
            (total / count).backward()
            if left_out:
                with pytest.raises(StokerError, match=f"leaves out {left_out}.*, which trainer.update does"):
                    trainer.optimizer.step()
            else:
                trainer.optimizer.step()
            trainer.optimizer.zero_grad()


def test_a_step_with_gradients_of_sums_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _open(tmp_path) as run:
        trainer = _trainer(run, lambda p: torch.optim.SGD(p, 0.001))
        for batch in trainer.steps(trainer.loader(ROWS, batch_size=8), max_steps=3):
            trainer.optimizer.zero_grad()
            trainer.backward(*_loss(trainer.forward(batch), batch))
            trainer.optimizer.step()
    assert caplog.text.count("takes the gradients of trainer.backward as they are") == 1
