"""What is said where memory runs out: a change that fits, as a next run with it shows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from stoker import Run, Trainer, Training
from stoker.engine import fitting, memory, out_of_memory
from stoker.errors import OutOfMemory
from strategies_run import Rows, inputs, llama, token_loss
from torch import nn

from support import SOAK


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda name="a": Run("test", name, runs=tmp_path / "runs")


def _trainer(run: Run, model: nn.Module | None = None, **settings: Any) -> Trainer:
    return Trainer(
        run, model or llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=inputs,
        loss=token_loss, training=Training(**{"precision": "fp32", **settings}),
    )  # fmt: skip


def _train(trainer: Trainer, data: Any = None, batch_size: int = 8) -> list[float]:
    loader = trainer.loader(data or Rows(), batch_size=batch_size)
    return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=2)]


@contextlib.contextmanager
def _activations_of(most: float) -> Iterator[list[int]]:
    """No more bytes than that are kept for a backward pass: the next one runs out. Yields what was kept."""
    kept, peak = 0, [0]

    def keep(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        nonlocal kept
        if kept + tensor.nbytes > most:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. 1.00 GiB is free. If reserved")
        kept += tensor.nbytes
        peak[0] = max(peak[0], kept)
        return tensor.detach(), _Counted(tensor.nbytes)  # an output itself would keep its own graph

    class _Counted(int):
        def __del__(self) -> None:
            nonlocal kept
            kept -= self

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda pair: pair[0]):
        yield peak


def _needed(open_run: Callable[..., Run], **settings: Any) -> int:
    """The least activations with which a training does not run out."""
    with open_run("needs") as run, _activations_of(math.inf) as peak:
        _train(_trainer(run, **settings))
    return peak[0]


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"micro_batch": 4}, {}, "micro_batch=4"),
    ({"micro_batch": 2}, {}, "micro_batch=2"),
    ({"micro_batch": 1}, {"micro_batch": 4}, "micro_batch=1"),
    (
        {"micro_batch": 1, "activation_checkpointing": "full"},
        {"micro_batch": 8},
        "micro_batch=1 activation_checkpointing=full",
    ),
]


@pytest.mark.soak
@pytest.mark.parametrize(("fits", "settings", "change"), CHANGES if SOAK else CHANGES[1:2])
def test_the_cheapest_change_that_fits_was_tried(
    fits: dict[str, Any], settings: dict[str, Any], change: str, open_run: Callable[..., Run]
) -> None:
    most = _needed(open_run, **fits)
    with open_run("fails") as run, _activations_of(most):
        trainer = _trainer(run, **settings)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with pytest.raises(OutOfMemory) as failed:
            _train(trainer)
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert str(failed.value) == (
        "out of memory on rank 0: Tried to allocate 2.00 GiB. 1.00 GiB is free. "
        f"Use {change}, which was tried and fits: the result stays the same"
    )
    given = dict(part.split("=") for part in change.split())
    if "micro_batch" in given:
        given["micro_batch"] = int(given["micro_batch"])  # type: ignore[assignment]
    with open_run("again") as run, _activations_of(most):
        assert len(_train(_trainer(run, **{**settings, **given}))) == 2


@pytest.mark.parametrize(
    ("has", "change"),
    [
        (2**34, "so sharding them would free little memory. Use smaller samples, or parallel=pipeline"),
        (None, r"Use parallel=fsdp over \d+ such ranks: the result stays the same"),
    ],
)
def test_where_nothing_of_one_rank_fits_it_is_said_what_more_ranks_would_do(
    has: int | None, change: str, open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    state = 16 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(memory, "of_a_rank", lambda device, ranks: has or state)
    with open_run() as run, _activations_of(0), pytest.raises(OutOfMemory, match=change):
        _train(_trainer(run, model, micro_batch=1))


def test_an_update_that_runs_out_is_not_answered_with_smaller_micro_batches(
    open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", run_out)
    monkeypatch.setattr(memory, "of_a_rank", lambda device, ranks: 2**22)
    with open_run() as run, pytest.raises(OutOfMemory, match=r"20.00 MiB. Use parallel=fsdp over \d+ such"):
        _train(_trainer(run))


class Wide(nn.Module):
    """A sample takes about 64 MiB of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = input_ids[:, :8].float() * self.weight
        for _ in range(8):
            x = torch.tanh(x.repeat(1, 2**18) if x.shape[1] == 8 else x)
        return x.mean(1, keepdim=True)


def _mean(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return output.sum(), len(output)


@contextlib.contextmanager
def _address_space_of(more: int) -> Iterator[None]:
    """So many bytes above what this process has: memory really runs out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_of_a_real_shortage_the_sizes_and_a_micro_batch_that_fits_are_said(
    open_run: Callable[..., Run],
) -> None:
    def trainer(run: Run, **settings: Any) -> Trainer:
        return Trainer(
            run, Wide(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=_mean, inputs=inputs,
            training=Training(precision="fp32", **settings),
        )  # fmt: skip

    with open_run("warm") as run:
        _train(trainer(run, micro_batch=1))
    with _address_space_of(500 * 2**20):
        with open_run() as run, pytest.raises(OutOfMemory) as failed:
            _train(trainer(run))
        said = str(failed.value)
        assert re.search(r"rank 0: Tried to allocate [\d.]+ MiB\. ", said)
        size = int(said.partition("Use micro_batch=")[2].partition(",")[0])
        assert size in (1, 2, 4)
    with _address_space_of(500 * 2**20), open_run("again") as run:  # beside what the first has left in pieces
        assert len(_train(trainer(run, micro_batch=size))) == 2


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (3.5, "micro_batch=2 or less (auto finds"),
        (1.5, "micro_batch=1 or less"),
        (0.5, "Use micro_batch=1 activation_checkpointing=full"),
    ],
)
def test_where_ranks_would_have_to_try_together_it_is_reckoned(
    free: float, expected: str, open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 samples 1 GiB is held and 7 more were asked for: one needs 2 GiB at least."""
    monkeypatch.setattr(out_of_memory, "numbers", lambda error, device: (7 * GIB, free * GIB, GIB))
    assert expected in _reckoned(open_run)


@pytest.mark.parametrize(
    ("free", "expected"),
    [(2, "micro_batch=2 or less"), (0, "more ranks, or the strategy's offload")],
)
def test_what_optimizers_are_going_to_keep_is_room_that_is_not_there(
    free: float, expected: str, open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 12 GiB, gradients and moments to come; of 8 samples 66 are held, 4 were asked for."""
    state = {"weights": 12 * GIB, "gradients": 12 * GIB, "optimizer": 0, "peak": 0}
    monkeypatch.setattr(memory, "by_kind", lambda step, device, training: state)
    monkeypatch.setattr(
        out_of_memory, "numbers", lambda error, device: (4 * GIB, free * GIB, (66 if free else 40) * GIB)
    )
    assert expected in _reckoned(open_run, micro=8)


def _reckoned(open_run: Callable[..., Run], micro: int = 4) -> str:
    with open_run() as run:
        trainer = _trainer(run)
        mesh = dataclasses.replace(trainer.mesh, world=dataclasses.replace(run.world, size=2))
        setting = dataclasses.replace(trainer._setting, mesh=mesh)
        change = fitting.Change(trainer._step, setting, trainer.training, "fsdp", 1)
        batch = {"input_ids": torch.zeros(8, 4, dtype=torch.long)}
        return change.of_a_pass(torch.OutOfMemoryError("none left"), batch, [1, 2, 4, 8], micro)


def test_with_the_optimizer_in_the_backward_pass_nothing_is_tried_that_moves_weights(
    open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "of_a_rank", lambda device, ranks: 2**20)
    for set_already, change in (
        ({}, "Use activation_checkpointing=full: "),
        (
            {"activation_checkpointing": "full"},
            r"Use optimizer_in_backward=false and parallel=fsdp over \d+ such",
        ),
    ):
        with open_run(f"run-{len(set_already)}") as run:
            trainer = _trainer(run, optimizer_in_backward=True, **set_already)
            before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            with _activations_of(0), pytest.raises(OutOfMemory, match=change):
                _train(trainer)
            assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_what_a_model_raises_when_it_is_tried_does_not_hide_that_memory_ran_out(
    open_run: Callable[..., Run],
) -> None:
    def raised(*_: Any, **given: Any) -> None:
        if len(given.get("input_ids", ())) < 8:
            raise RuntimeError("of 8 samples alone")
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    with open_run() as run:
        trainer = _trainer(run)
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: raised(**kwargs), with_kwargs=True
        )
        with pytest.raises(OutOfMemory, match=r"2\.00 GiB\. Use micro_batch=4 or less"):
            _train(trainer)


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11", 2.5 * 2**30),
        ("Tried to allocate 64.0 MiB. 1.0 GiB of memory are free.", 64 * 2**20),
        ("none left", 0),
    ],
)
def test_what_was_asked_for_is_read_from_the_message(message: str, asked: float) -> None:
    found, free, held = out_of_memory.numbers(torch.OutOfMemoryError(message), torch.device("cpu"))
    assert found == asked
    assert free > 0 < held
