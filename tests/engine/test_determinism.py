"""Deterministic mode: what it sets, what it refuses and where that stands. On GPUs: tests/gpu."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stoker
import strategies_run
import torch
from stoker.engine import determinism
from stoker.errors import StokerError
from strategies_run import PutsBackward
from test_strategies import STRATEGIES
from torch import nn
from torch.nn.functional import max_unpool2d, mse_loss

import ranks
from support import SOAK

INDEX = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is what it was, for other tests."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.deterministic = False


class Puts(nn.Module):
    """Uses an operation whose forward pass has no deterministic form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y.clone().put_(INDEX, x.flatten()[:2])  # the line


class Unpools(nn.Module):
    """Uses one through a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)[None]
        return max_unpool2d(y, torch.zeros_like(y, dtype=torch.int64), 1)[0]  # the line


def _trainer(model: nn.Module, folder: Path, **options: Any) -> tuple[stoker.Run, stoker.Trainer]:
    run = stoker.Run("e", runs=folder)
    return run, stoker.Trainer(
        run, model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), inputs=lambda x: (x,),
        loss=lambda out, x: (mse_loss(out, x, reduction="sum"), len(x)),
        training=stoker.Training(deterministic=True, **options),
    )  # fmt: skip


def _line(model: type[nn.Module]) -> str:
    """Where a model says that its line is."""
    file = inspect.getsourcefile(model)
    assert file is not None
    lines, first = inspect.getsourcelines(model)
    within = next(number for number, line in enumerate(lines) if line.endswith("# the line\n"))
    return f"{file}:{first + within}"


def test_it_sets_what_decides_over_bits() -> None:
    determinism.require()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_what_the_environment_says_of_cublas_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    determinism.require()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("model", "operation"),
    [(Puts, "put_"), (Unpools, "max_unpooling2d_forward_out"), (PutsBackward, "put_")],
    ids=["forward", "within a function of torch", "backward"],
)
def test_an_operation_without_such_a_form_is_named_with_the_line_that_calls_it(
    model: type[nn.Module], operation: str, tmp_path: Path
) -> None:
    run, trainer = _trainer(model(), tmp_path)
    with run, pytest.raises(StokerError) as raised:
        trainer.step(torch.ones(4, 2))
    said = str(raised.value)
    assert said.startswith(f"{operation} has no deterministic form, but deterministic=true requires one")
    assert f"it is called at {_line(model)} (" in said


EVERY = [
    *((name, False) for name in ("ddp", "fsdp", "1f1b", "zero-0", "zero-2", "zero-3")),
    *((name, True) for name in ("single", "ddp", "fsdp")),
]
FEW = [("ddp", False), ("1f1b", False), ("zero-3", False), ("single", True), ("fsdp", True)]


@pytest.mark.soak
@pytest.mark.parametrize(("name", "own"), EVERY if SOAK else FEW)
def test_it_is_named_under_every_strategy_and_in_a_loop_of_its_own(
    name: str, own: bool, tmp_path: Path
) -> None:
    size, settings = STRATEGIES.get(name, (1, {}))
    fails = strategies_run.without_deterministic_form
    said = ranks.run(fails, size, tmp_path, tmp_path, "a", settings, own=own)[-1]
    assert "put_ has no deterministic form" in said
    assert f"it is called at {_line(PutsBackward)} (" in said


def test_a_loop_without_steps_is_told_which_operation_it_is(tmp_path: Path) -> None:
    run, trainer = _trainer(PutsBackward(), tmp_path)
    with (
        run,
        pytest.raises(StokerError, match=r"put_ has no .*; it is part of the backward"),
    ):
        trainer.backward(trainer.forward(torch.ones(4, 2)).sum(), 4)


def test_another_error_passes_as_it_is(tmp_path: Path) -> None:
    run, trainer = _trainer(nn.Linear(3, 2), tmp_path)
    with run, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.step(torch.ones(4, 2))
