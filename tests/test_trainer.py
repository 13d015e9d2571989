"""The loop against plain PyTorch, in one process; kills and signals are in tests/cli."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stoker import BadInput, Run, StokerError, Trainer, Training, loops
from stoker.checkpoint import manifest, store, trees
from stoker.data.loader import Loader
from stoker.duration import Duration
from stoker.engine import batches, optimizers, position, schedule
from stoker.engine.random_state import seed_everything
from stoker.engine.settings import Ema
from stoker.errors import OutOfMemory
from stoker.run import journal, view
from stoker.status import FAILED
from stoker.world import World
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from support import SOAK


def _dataset(size: int = 50) -> TensorDataset:
    made = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 6, generator=made), torch.randint(0, 3, (size,), generator=made))


def _model(dropout: float = 0.0) -> nn.Module:
    seed_everything(0)
    return nn.Sequential(
        nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    )  # fmt: skip


def _loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return cross_entropy(output, batch[1], reduction="sum"), len(batch[1])


def _weighted_loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Only the first two classes count, so micro-batches have different weights."""
    counts = batch[1] < 2
    return cross_entropy(output, batch[1], reduction="none")[counts].sum(), counts.sum()


def _trainer(run: Run, model: nn.Module, **options: Any) -> Trainer:
    lr = options.pop("lr", 0.01)
    settings = {f.name: options.pop(f.name) for f in dataclasses.fields(Training) if f.name in options}
    made = {"optimizer": lambda p: torch.optim.AdamW(p, lr=lr), "loss": _loss, **options}
    return Trainer(run, model, training=Training(**{"precision": "fp32", **settings}), **made)


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda name="a", **options: Run("test", name, runs=tmp_path / "runs", **options)


def _plain(
    model: nn.Module,
    trainer: Trainer,
    steps: int,
    *,
    loss: Any = _loss,
    shape: Any = None,
    clip: float | None = None,
) -> list[float]:
    """The same training written out in plain PyTorch, on the loader's own batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape) if shape else None
    batches = trainer.loader(_dataset(), batch_size=8).batches(0)
    losses = []
    for _ in range(steps):
        batch = next(batches)
        total, weight = loss(model(batch[0]), batch)
        mean = total / weight
        optimizer.zero_grad()
        mean.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(mean.item())
    return losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("shape", [None, "cosine"])
@pytest.mark.parametrize("loss", [_loss, _weighted_loss])
def test_a_run_is_the_plain_loop(
    open_run: Callable[..., Run], clip: float | None, shape: Any, loss: Any
) -> None:
    factor = schedule.build(shape, warmup=0.2) if shape else None
    model = _model()
    twin = copy.deepcopy(model)
    with open_run() as run:
        trainer = _trainer(run, model, loss=loss, clip_norm=clip, schedule=factor)
        losses = [
            trainer.step(batch).item()
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=20)
        ]
    by_step = (lambda step: factor(step, 20)) if factor else None
    expected = _plain(twin, trainer, 20, loss=loss, shape=by_step, clip=clip)
    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def _without_batch_norm() -> nn.Module:
    """BatchNorm sees a micro-batch only, so accumulation cannot be the same for it."""
    seed_everything(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class _Wrapping(MutableMapping[str, torch.Tensor]):
    """A mapping of which a shallow copy shares what it wraps."""

    def __init__(self, wrapped: dict[str, torch.Tensor]) -> None:
        self.wrapped = wrapped

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.wrapped[key]

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        self.wrapped[key] = value

    def __delitem__(self, key: str) -> None:
        del self.wrapped[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.wrapped)

    def __len__(self) -> int:
        return len(self.wrapped)


def test_a_batch_of_transformers_own_is_split_and_moved_as_a_dict_is(open_run: Callable[..., Run]) -> None:
    def losses(collate: Any, **settings: Any) -> list[float]:
        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                seed_everything(0)
                self.layer = nn.Linear(6, 3)

            def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
                return self.layer(x)

        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            return cross_entropy(output, batch["y"], reduction="sum"), len(batch["y"])

        with open_run(str(len(made))) as run:
            made.append(run)
            trainer = _trainer(run, Classifier(), loss=loss, **settings)
            loader = trainer.loader(_dataset(), batch_size=8, collate=collate)
            return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=3)]

    def as_dict(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}

    made: list[Run] = []
    expected = losses(as_dict)
    for settings in ({}, {"micro_batch": 8}, {"micro_batch": "auto"}):
        assert losses(lambda rows: BatchEncoding(as_dict(rows)), **settings) == expected
    parts = losses(lambda rows: BatchEncoding(as_dict(rows)), micro_batch=3)
    assert parts == pytest.approx(expected, rel=1e-5)
    split = list(batches.split((BatchEncoding({"x": torch.zeros(5, 2)}), ["a"] * 5), 3))
    assert [(part["x"].shape, len(names), type(part)) for part, names in split] == [
        ((3, 2), 3, BatchEncoding), ((2, 2), 2, BatchEncoding),
    ]  # fmt: skip
    own = _Wrapping({"x": torch.arange(5)})
    assert [part["x"].tolist() for part in batches.split(own, 3)] == [[0, 1, 2], [3, 4]]
    assert own["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 8, 100])
def test_accumulation_does_not_change_the_result(open_run: Callable[..., Run], micro_batch: int) -> None:
    weights, losses = [], []
    for size in (None, micro_batch):
        model = _without_batch_norm()
        with open_run(f"m{size}") as run:
            trainer = _trainer(run, model, loss=_weighted_loss, micro_batch=size)
            loader = trainer.loader(_dataset(), batch_size=8)
            losses.append([trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=10)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


class _Dies(Exception):
    """What ends a script in the middle of a step."""


def _train(run: Run, dies_in: int | None = None, **options: Any) -> nn.Module:
    model = _model(dropout=0.5)
    trainer = _trainer(run, model, checkpoint_every=4, **options)
    for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=15):
        run.log(loss=trainer.step(batch))
        if run.step == dies_in:
            raise _Dies
    return model


def test_resuming_gives_the_same_bits(open_run: Callable[..., Run]) -> None:
    with open_run("whole") as run:
        whole = _train(run)
    for stop in (6, 11):
        with pytest.raises(_Dies), open_run("cut") as run:
            _train(run, dies_in=stop)
    with open_run("cut") as run:
        resumed = _train(run)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    seen = view.load(run.directory)
    assert [a.resumed_from for a in seen.attempts] == [None, 4, 8]
    assert (
        seen.points["loss"]
        == view.load(run.directory.__class__(run.directory.path.parent / "whole")).points["loss"]
    )


def test_a_watch_goes_on_at_the_steps_of_an_uninterrupted_run(open_run: Callable[..., Run]) -> None:
    for dies_in in (6, 11, None):
        with contextlib.suppress(_Dies), open_run() as run:
            model = _model()
            run.watch(model, every=3)  # before the Trainer resumes
            trainer = _trainer(run, model, checkpoint_every=4)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=15):
                run.log(loss=trainer.step(batch))
                if run.step == dies_in:
                    raise _Dies
    seen = view.load(run.directory)
    assert [a.resumed_from for a in seen.attempts] == [None, 4, 8]
    assert list(seen.points["parameters/0.weight"]) == [1, 4, 7, 10, 13]


class _Curriculum:
    """What a script may keep beside its model: numbers, tensors, a generator's state."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(1)
        self.drawn = np.zeros(3)
        self.mean = torch.zeros(6)
        self.hardest: tuple[int, float] = (0, math.inf)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.bit_generator.state = state.pop("random")
        vars(self).update(state)

    def see(self, batch: Any, loss: float) -> None:
        self.drawn[self.random.integers(3)] += loss
        self.mean.lerp_(batch[0].mean(dim=0), 0.1)
        self.hardest = min(self.hardest, (int(self.random.integers(9)), loss))


def _sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 12)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5, cycle_momentum=False),
    "sequence": _sequence,
}


def _train_with_states(run: Run, scheduler: str, dies_in: int | None = None) -> tuple[list[float], Any]:
    trainer = _trainer(run, _model(dropout=0.5), checkpoint_every=4)
    states = {"scheduler": SCHEDULERS[scheduler](trainer.optimizer), "curriculum": _Curriculum()}
    temperature = nn.Parameter(torch.ones(()))
    other = torch.optim.Adam([temperature], lr=0.1)
    trainer.register_for_checkpointing(**states, other=other, ema=(ema := AveragedModel(trainer.model)))
    rates = []
    for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=15):
        rates.append(trainer.lr)
        loss = trainer.step(batch).item()
        if run.step == dies_in:
            raise _Dies
        temperature.grad = torch.tensor(loss)
        other.step()
        ema.update_parameters(trainer.model)
        states["curriculum"].see(batch, loss)
        states["scheduler"].step(*([loss] if scheduler == "plateau" else []))
    held = [s.state_dict() for s in (*states.values(), other, ema)]
    return rates, trees.apart([trainer.state_dict(), held])


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_script_registers_is_restored_to_the_same_bits(
    scheduler: str, open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run("whole") as run:
        rates, whole = _train_with_states(run, scheduler)
    assert len(set(rates)) > 2
    for stop in (6, 11) if SOAK else (11,):
        with pytest.raises(_Dies), open_run("cut") as run:
            _train_with_states(run, scheduler, dies_in=stop)
    with open_run("cut") as run:
        rest, resumed = _train_with_states(run, scheduler)
    assert rest == rates[8:]
    assert resumed[0] == whole[0]
    assert "the learning rate is" not in caplog.text, "it is what it was"
    assert all(torch.equal(tensor, resumed[1][at]) for at, tensor in whole[1].items())


def test_a_state_that_came_later_or_went_is_named(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    def train(steps: int, *names: str) -> None:
        with open_run() as run:
            trainer = _trainer(run, _model())
            trainer.register_for_checkpointing(**{name: _Curriculum() for name in names})
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                trainer.step(batch)

    train(1, "first", "second")
    assert "state of" not in caplog.text
    train(2, "second", "third")
    assert "the checkpoint has no state for third, which starts from scratch" in caplog.text
    assert "the checkpoint has state for first, which is no longer registered" in caplog.text
    caplog.clear()
    train(3, "second", "third")
    assert "state of" not in caplog.text


def test_a_state_that_cannot_be_saved_is_refused_where_it_is_registered(open_run: Callable[..., Run]) -> None:
    class Rules(_Curriculum):
        def state_dict(self) -> dict[str, Any]:
            return {"rules": [1, lambda: 2]}

    with open_run() as run:
        trainer = _trainer(run, _model(), schedule=schedule.build("cosine"))
        with pytest.raises(BadInput, match=r"of easy has .*<lambda> at \['rules'\]\[1\], but"):
            trainer.register_for_checkpointing(easy=Rules())
        with pytest.raises(BadInput, match="it is an object of type list: it must have"):
            trainer.register_for_checkpointing(it=[])
        with pytest.raises(BadInput, match="it is the class _Curriculum"):
            trainer.register_for_checkpointing(it=_Curriculum)
        trainer.register_for_checkpointing(it=_Curriculum())
        with pytest.raises(BadInput, match="it is already registered"):
            trainer.register_for_checkpointing(it=_Curriculum())
        with pytest.raises(ValueError, match="falls and schedule= would both set the learning rate"):
            trainer.register_for_checkpointing(falls=SCHEDULERS["lambda"](trainer.optimizer))
        for _ in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=1):
            with pytest.raises(ValueError, match="within a step"):
                trainer.register_for_checkpointing(late=_Curriculum())


def test_a_changed_rate_that_a_scheduler_does_not_know_is_said(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    for steps, lr in ((1, 0.01), (2, 0.5)):
        with open_run() as run:
            trainer = _trainer(run, _model(), lr=lr)
            trainer.register_for_checkpointing(falls=SCHEDULERS["steps"](trainer.optimizer))
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                trainer.step(batch)
    assert "the learning rate is [0.5] now, but falls continues from [0.01]" in caplog.text


class _Rates:
    """A scheduler in an object of the script's own, which saves its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.falls = SCHEDULERS["lambda"](optimizer)
        self.state_dict, self.load_state_dict = self.falls.state_dict, self.falls.load_state_dict


@pytest.mark.parametrize(
    ("registered", "warnings"),
    [(None, 1), (lambda scheduler: scheduler, 0), (lambda scheduler: _Rates(scheduler.optimizer), 0)],
)
def test_a_scheduler_that_no_checkpoint_will_have_is_said_once(
    registered: Callable[[Any], Any] | None,
    warnings: int,
    open_run: Callable[..., Run],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        scheduler = SCHEDULERS["sequence"](trainer.optimizer)
        trainer.register_for_checkpointing(curriculum=_Curriculum())
        if registered is not None:
            trainer.register_for_checkpointing(scheduler=registered(scheduler))
        for steps in (1, 2):
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                trainer.step(batch)
    said = [one for one in caplog.messages if "register_for_checkpointing(scheduler=scheduler)" in one]
    assert len(said) == warnings
    assert all("the optimizer has a learning rate scheduler that is not registered" in one for one in said)


def test_the_optimizer_whose_scheduler_is_not_registered_is_named(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 2)})
        trainer = _trainer(run, model, optimizer=dict.fromkeys(model, torch.optim.Adam))
        first, second = (SCHEDULERS["steps"](trainer.optimizers[name]) for name in model)
        trainer.register_for_checkpointing(scheduler=first)
        for _ in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=1):
            assert second.optimizer is trainer.optimizers["second"]
    assert "the optimizer of second has a learning rate scheduler" in caplog.text


@pytest.mark.parametrize(("adds", "bad"), [(False, 8), (True, 8), (True, 7)])
def test_a_rewind_goes_no_further_back_than_what_is_trained_now(
    adds: bool, bad: int, open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        total, count = _loss(output, batch)
        return total * (float("nan") if run.step == bad else 1.0), count

    model, weights = _model(), {}
    first = model[0].requires_grad_(False)
    since = r"step 7: .* left to rewind to: those before step 7 are of a model of which other weights"
    with (
        pytest.raises(StokerError, match=since) if bad == 7 else contextlib.nullcontext(),
        open_run() as run,
    ):
        trainer = _trainer(
            run, model, loss=loss, on_bad_loss="rewind", checkpoint_every=5,
            optimizer=lambda p: torch.optim.SGD(p if adds else model.parameters(), lr=0.1),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=10):
            if run.step == 7:
                first.requires_grad_(True)
                if adds:
                    trainer.optimizer.add_param_group({"params": list(first.parameters())})
            trainer.step(batch)
            weights[run.step] = first.weight.detach().clone()
        assert not torch.equal(weights[7], weights[6])
        assert torch.equal(weights[8], weights[7])
        assert not torch.equal(weights[9], weights[8])
    assert ("rewound the weights to those of step 7" in caplog.text) == (bad == 8)


def test_a_rewind_puts_registered_states_back_with_the_weights(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        spoilt = {5}

        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            total, weight = _loss(output, batch)
            return (total * math.nan if spoilt and run.step in spoilt else total), weight

        trainer = _trainer(run, _model(), loss=loss, on_bad_loss="rewind", checkpoint_every=3)
        trainer.register_for_checkpointing(curriculum=(curriculum := _Curriculum()))
        seen = []
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=6):
            trainer.step(batch)
            seen.append(float(curriculum.drawn.sum()))
            curriculum.see(batch, 1.0)
    assert seen == [0.0, 1.0, 2.0, 3.0, 3.0, 4.0]


def test_a_changed_learning_rate_wins_over_the_saved_one(open_run: Callable[..., Run]) -> None:
    with pytest.raises(_Dies), open_run() as run:
        _train(run, dies_in=6, lr=0.01)
    with open_run() as run:
        trainer = _trainer(run, _model(), lr=0.5)
        assert trainer.steps_done == 4
        assert trainer.lr == 0.5
    with open_run() as run:
        assert _trainer(run, _model(), lr=0.01).lr == 0.01


def test_a_checkpoint_of_another_model_names_what_differs(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        _train(run)
    other = nn.Sequential(nn.Linear(6, 17, bias=False), nn.BatchNorm1d(17))
    with open_run() as run, pytest.raises(StokerError) as error:
        _trainer(run, other)
    assert "unexpected: model.4.bias, model.4.weight" in str(error.value)
    assert "with a different shape: model.0.weight (16, 6) -> (17, 6)" in str(error.value)
    assert manifest.says_unfit(str(error.value))


def test_a_checkpoint_with_weight_decay_on_norms_too_goes_on(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    def trained(run: Run, steps: int, **settings: Any) -> Trainer:
        make = optimizers.factory("adamw", lr=0.05, **settings)
        trainer = _trainer(run, _model(), optimizer=make)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
            run.log(loss=trainer.step(batch))
        return trainer

    with open_run("whole") as run:
        whole = trained(run, 8, weight_decay=0.5, decay_all=True).state_dict()
    for name in ("same", "less", "more"):
        with open_run(name) as run:
            trained(run, 4, weight_decay=0.0 if name == "more" else 0.5, decay_all=True)
    with open_run("same") as run:
        again = trained(run, 8, weight_decay=0.5, decay_all=True).state_dict()
        assert all(torch.equal(again[n], t) for n, t in whole.items())
    assert "weight decay applies to different parameters" not in caplog.text
    with open_run("more") as run:  # the user's change
        assert _decays(trained(run, 8, weight_decay=0.5)) == [0.5, 0.0]
    assert "weight decay applies to different parameters" not in caplog.text
    with open_run("less") as run:
        trainer = trained(run, 6, weight_decay=0.5)
        assert _decays(trainer) == [0.5, 0.0]
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {0.05}
    assert "weight decay applies to different parameters" in caplog.text
    with open_run("less") as run:
        assert _decays(trained(run, 8, weight_decay=0.5, decay_all=True)) == [0.5]


def _decays(trainer: Trainer) -> list[float]:
    return [group["weight_decay"] for group in trainer.optimizer.param_groups]


def test_a_checkpoint_of_another_optimizer_is_refused(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        _train(run)
    halves = lambda p: torch.optim.AdamW([{"params": p[:2]}, {"params": p[2:]}])  # noqa: E731
    with open_run() as run, pytest.raises(StokerError, match="optimizer has groups"):
        _trainer(run, _model(), optimizer=halves)


def test_several_optimizers_are_the_plain_loop(open_run: Callable[..., Run]) -> None:
    """Two players on one batch, as a GAN has them: neither's backward may leak into the other's step."""

    def players() -> nn.ModuleDict:
        seed_everything(3)
        return nn.ModuleDict({"maker": nn.Linear(6, 6), "judge": nn.Linear(6, 1)})

    def judge_loss(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return (model["judge"](x) - model["judge"](model["maker"](x).detach())).sum()

    def maker_loss(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return model["judge"](model["maker"](x)).square().sum()

    model, twin = players(), players()
    make = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)  # noqa: E731
    with open_run() as run:
        trainer = Trainer(run, model, optimizer={"maker": make, "judge": make})
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=6):
            for part in trainer.micro(batch):
                trainer.backward(judge_loss(model, part[0]), len(part[0]))
            trainer.update(trainer.optimizers["judge"])
            for part in trainer.micro(batch):
                trainer.backward(maker_loss(model, part[0]), len(part[0]))
            trainer.update(trainer.optimizers["maker"])
    batches = trainer.loader(_dataset(), batch_size=8).batches(0)
    plain = {name: make(twin[name].parameters()) for name in ("maker", "judge")}
    for _ in range(6):
        x = next(batches)[0]
        for name, loss in (("judge", judge_loss), ("maker", maker_loss)):
            twin.zero_grad()
            (loss(twin, x) / 8).backward()
            plain[name].step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_of_several_optimizers_that_with_a_bad_loss_is_left_out(open_run: Callable[..., Run]) -> None:
    """And losses of different sizes are no spikes."""
    players = nn.ModuleDict({"small": nn.Linear(6, 3), "large": nn.Linear(6, 3)})
    make = lambda p: torch.optim.SGD(p, lr=1e-6)  # noqa: E731
    factors, seen = {"small": 1.0, "large": 1e4}, []
    with open_run() as run:
        trainer = _trainer(
            run, players, optimizer={"small": make, "large": make}, loss=None, on_bad_loss="skip", spike=2.0
        )
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=15):
            for name, optimizer in trainer.optimizers.items():
                before = players[name].weight.detach().clone()
                factor = math.nan if (name, run.step) == ("small", 13) else factors[name]
                for part in trainer.micro(batch):
                    total, weight = _loss(players[name](part[0]), part)
                    trainer.backward(total * factor, weight)
                trainer.update(optimizer)
                if torch.equal(before, players[name].weight):
                    seen.append((name, run.step))
    assert seen == [("small", 13)]


def test_a_loss_that_counts_nothing_or_is_discarded_is_not_judged(open_run: Callable[..., Run]) -> None:
    """A part without labels, whose mean is NaN; a loss whose gradients the loop itself has cleared."""
    with open_run() as run:
        trainer = _trainer(run, _model(), loss=None)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=6):
            total, weight = _loss(trainer.forward(batch), batch)
            if run.step == 3:
                trainer.backward(total * math.nan, weight)
                trainer.model.zero_grad()
                continue
            trainer.backward(total.reshape(1), weight)
            if run.step == 4:
                trainer.backward(_loss(trainer.forward(batch), batch)[0] * 0, torch.tensor(0))
                nothing = cross_entropy(trainer.forward(batch), torch.full_like(batch[1], -100))
                trainer.backward(nothing * 0, 0)
            trainer.update()
    assert trainer.steps_done == 6
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_what_a_script_keeps_in_evaluation_mode_stays_so(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        trainer.model[1].eval()
        trainer.evaluate(_dataset(), batch_size=8)
        assert [module.training for module in trainer.model] == [True, False, True, True, True]


class _Pretrained(nn.Sequential):
    """Left in evaluation mode by what loads it."""

    @classmethod
    def from_pretrained(cls) -> _Pretrained:
        return cls(nn.Linear(3, 3), nn.Dropout()).eval()


def test_a_part_in_evaluation_mode_stays_so_and_a_pretrained_one_is_trained(
    open_run: Callable[..., Run],
) -> None:
    """A teacher, frozen or used without gradients, and batch norms whose statistics are kept."""
    parts = nn.ModuleDict({
        "student": _model(), "teacher": _model().eval(), "body": _Pretrained.from_pretrained(),
        "frozen": _Pretrained.from_pretrained().requires_grad_(False),
    })  # fmt: skip
    parts["student"][1].eval()
    with open_run("a") as run:
        model = _trainer(run, parts).model
        assert [name for name, module in model.named_children() if module.training] == ["student", "body"]
        assert [module.training for module in model["student"]] == [True, False, True, True, True]
        assert all(module.training for module in model["body"])
        assert not any(module.training for module in model["teacher"].modules())
        assert not any(module.training for module in model["frozen"].modules())
    with open_run("b") as run:
        assert all(module.training for module in _trainer(run, _Pretrained.from_pretrained()).model.modules())


def test_without_an_optimizer_it_evaluates_and_does_not_train(open_run: Callable[..., Run]) -> None:
    with open_run("a") as run:
        trained = _trainer(run, _model()).evaluate(_dataset(), batch_size=7)
    with open_run("b") as run:
        trainer = _trainer(run, _model().requires_grad_(False), optimizer=None)
        assert trainer.evaluate(_dataset(), batch_size=7) == trained
        with pytest.raises(ValueError, match="has no optimizer"):
            next(iter(trainer.steps(trainer.loader(_dataset(), batch_size=5), epochs=1)))


def test_evaluation_weighs_every_sample_once_and_leaves_no_trace(open_run: Callable[..., Run]) -> None:
    dataset = _dataset(21)
    with open_run() as run:
        model = _model(dropout=0.5)
        trainer = _trainer(run, model, loss=_weighted_loss)
        before = torch.get_rng_state()
        found = trainer.evaluate(dataset, batch_size=4)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training
    model.eval()
    total, weight = _weighted_loss(model(dataset.tensors[0]), (None, dataset.tensors[1]))
    assert found == pytest.approx((total / weight).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (3, [3, 6, 9, 12]), ("1ep", [7, 13]), ("2ep", [13]), ("0.5ep", [4, 7, 10, 13]),
        ("0.1ep", list(range(1, 14))), ("16samples", [2, 4, 6, 8, 10, 12]), ("50samples", [7, 13]),
    ],
)  # fmt: skip
def test_every_is_true_on_the_step_that_completes_a_duration(
    open_run: Callable[..., Run], every: Any, expected: list[int]
) -> None:
    """50 samples in batches of 8: an epoch is 6.25 steps."""
    seen = []
    with open_run() as run:
        trainer = _trainer(run, _model())
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), epochs=2):
            trainer.step(batch)
            if trainer.every(every):
                seen.append(run.step)
        assert trainer.steps_done == 13
    assert seen == expected


def test_the_clock_is_refused_where_the_curve_would_depend_on_it(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        loader = trainer.loader(_dataset(), batch_size=8)
        with pytest.raises(ValueError, match="for the body of the loop"):
            trainer.every("1ep")
        with pytest.raises(ValueError, match="differs between machines"):
            next(trainer.steps(loader, max_steps="10min"))
        with pytest.raises(ValueError, match="how many tokens"):
            next(trainer.steps(loader, max_steps="1000tok"))
        batches = trainer.steps(loader, max_steps=2)
        next(batches)
        with pytest.raises(ValueError, match="depends on the machine's speed"):
            trainer.every("10min")


class _Rows(TensorDataset):
    """Samples of a given number of tokens."""

    def __init__(self, tokens: float) -> None:
        super().__init__(*_dataset().tensors)
        self.tokens_per_sample = tokens


def test_tokens_done_stay_those_of_the_rows_that_they_were_in(open_run: Callable[..., Run]) -> None:
    def trained(tokens: float, until: str) -> list[int]:
        with open_run() as run:
            trainer = _trainer(run, _model())
            found = []
            for batch in trainer.steps(trainer.loader(_Rows(tokens), batch_size=8), max_steps=until):
                found.append(trainer.step_metrics()["tokens"])
                trainer.step(batch)
            return found

    assert trained(6.0, "200tok") == [48, 96, 144, 192, 240]
    assert trained(12.5, "600tok") == [340, 440, 540, 640], "longer rows: 100 tokens a step from here on"
    assert not trained(1.0, "600tok")


@pytest.mark.parametrize("began", [[1, 5, 40], [1, 5, 40, 240.0]])
def test_a_position_without_tokens_is_read(began: list[float]) -> None:
    """As in a checkpoint of an earlier version."""
    at = position.read({"step": 9, "samples": 72, "history": {}, "began": [began]})
    assert at.began == {1: (5, 40, sum(began[3:]))}
    loader = Loader(_Rows(6.0), batch_size=8, world=World(), seed=0)
    loop = loops.begin(1, loader, Duration.parse("600tok"), at, from_here=False)
    assert (at.tokens, loop.end) == (432.0, 9 + 4)


def test_old_checkpoints_go_and_the_last_stays(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        _train(run, keep_checkpoints=2)
    names = sorted(p.name for p in run.directory.checkpoints.iterdir())
    assert names == ["step-00000012", "step-00000015"]


def test_a_frozen_model_is_refused(open_run: Callable[..., Run]) -> None:
    with open_run() as run, pytest.raises(ValueError, match="no trainable parameters"):
        _trainer(run, _model().requires_grad_(False))


class _WithTeacher(nn.Module):
    """A part that is trained, one that follows it by hand, and one that nobody touches."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.still = _model(), _model(), _model()
        self.teacher.requires_grad_(False)
        self.still.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) + self.teacher(x) + self.still(x)  # type: ignore[no-any-return]


def test_frozen_values_that_change_places_are_saved(open_run: Callable[..., Run]) -> None:
    def train(name: str, steps: int) -> torch.Tensor:
        with open_run(name) as run:
            model = _model()
            model.codes = nn.Parameter(torch.arange(64.0), requires_grad=False)  # type: ignore[assignment]
            trainer = _trainer(run, model)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                trainer.step(batch)
                model.codes.data.copy_(model.codes.roll(2))  # type: ignore[operator, union-attr]
        return model.codes.detach().clone()  # type: ignore[operator, union-attr, return-value]

    whole = train("whole", 5)
    train("cut", 3)
    assert torch.equal(train("cut", 5), whole)


def _follow(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        for mean, value in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.data.lerp_(value.data, 0.3)


def test_a_frozen_part_that_is_moved_by_hand_goes_on_where_it_was_and_one_that_stays_is_not_saved(
    open_run: Callable[..., Run],
) -> None:
    def train(name: str, steps: int) -> nn.Module:
        with open_run(name) as run:
            model = _WithTeacher()
            trainer = _trainer(run, model)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                run.log(loss=trainer.step(batch))
                _follow(model.teacher, model.student)
        (*_, newest) = sorted(run.directory.checkpoints.iterdir())
        saved = store.shapes(manifest.read(newest)).keys()
        assert {"model.student.0.weight", "model.teacher.0.weight"} <= saved
        assert "model.still.0.weight" not in saved
        return model

    whole = train("whole", 9).state_dict()
    train("cut", 5)
    resumed = train("cut", 9).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("begins", ["frozen", "trained"])
def test_what_is_frozen_or_thawed_on_the_way_is_so_after_a_restart(
    open_run: Callable[..., Run], begins: str
) -> None:
    def train(name: str, steps: int) -> nn.Module:
        with open_run(name) as run:
            model = _model()
            model[0].requires_grad_(begins == "trained")
            trainer = _trainer(run, model, optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=0.1))
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                if run.step == 3:
                    model[0].requires_grad_(begins == "frozen")
                run.log(loss=trainer.step(batch))
        return model

    whole = train("whole", 9)
    train("cut", 5)
    resumed = train("cut", 9)
    assert resumed[0].weight.requires_grad == (begins == "frozen")  # type: ignore[index, union-attr]
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())


def _assert_goes_on(
    open_run: Callable[..., Run],
    make: Callable[[], nn.Module],
    on_the_way: Callable[[Trainer], None] = lambda trainer: None,
    **options: Any,
) -> dict[str, Any]:
    """A run that is cut, and goes on, has the weights of one that is not, which are returned; in step 3
    something is changed.
    """

    def train(name: str, steps: int) -> dict[str, Any]:
        with open_run(name) as run:
            trainer = _trainer(run, make(), **options)
            trainer.model.train()  # as many a script does
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                if run.step == 3:
                    on_the_way(trainer)
                run.log(loss=trainer.step(batch))
        return trainer.model.state_dict()

    whole = train("whole", 9)
    train("cut", 5)
    torch.testing.assert_close(train("cut", 9), whole, rtol=0, atol=0)
    return whole


class _Momentary(nn.Module):
    """Buffers that are not persistent: one is written to, one is replaced, as caches are, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _model()
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("every_second", torch.arange(8.0)[::2], persistent=False)
        self.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x.new_zeros(len(self.cache) + 1)
        self.scale.mul_(0.9)
        return self.model(x)  # type: ignore[no-any-return]


def test_a_buffer_that_no_checkpoint_has_but_changes_is_told_once(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        _run_on(_trainer(run, _Momentary(), checkpoint_every=1), 3)
    told = [text for text in caplog.messages if "not persistent" in text]
    assert len(told) == 1
    assert told[0].startswith(
        "step 1: buffers that are not persistent have changed (scale), but no checkpoint"
    )


class _Prototypes(nn.Module):
    """A frozen table of which a row is moved, and frozen values that nobody moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()
        self.table = nn.Parameter(torch.zeros(6003)[3:].view(1000, 6), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.table[7].lerp_(x.mean(0), 0.1)
        return self.inner(self.scale * (x - self.table[7]))  # type: ignore[no-any-return]


def test_a_frozen_table_of_which_a_row_is_moved_goes_on_as_it_was(open_run: Callable[..., Run]) -> None:
    _assert_goes_on(open_run, _Prototypes)


def test_what_is_put_in_evaluation_mode_on_the_way_is_so_after_a_restart(
    open_run: Callable[..., Run],
) -> None:
    _assert_goes_on(open_run, lambda: _model(dropout=0.5), lambda trainer: trainer.model[3].eval())


@pytest.mark.parametrize("trains", [True, False])
def test_a_mode_that_a_script_sets_before_its_loop_is_the_one_that_it_sets_now(
    open_run: Callable[..., Run], trains: bool
) -> None:
    for mode, steps in ((not trains, 3), (trains, 5)):
        with open_run() as run:
            trainer = _trainer(run, _model())
            trainer.model[3].train(mode)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                assert trainer.model[3].training == mode
                trainer.step(batch)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("given", ["a group", "parameters"])
def test_what_an_optimizer_is_given_on_the_way_it_has_after_a_restart(
    open_run: Callable[..., Run], given: str, in_backward: bool
) -> None:
    def half_frozen() -> nn.Module:
        model = _model()
        model[0].requires_grad_(False)
        return model

    def thaw(trainer: Trainer) -> None:
        thawed = list(trainer.model[0].requires_grad_(True).parameters())
        if given == "a group":
            trainer.optimizer.add_param_group({"params": thawed, "lr": 0.1})
        else:
            trainer.optimizer.param_groups[0]["params"] += thawed

    whole = _assert_goes_on(
        open_run, half_frozen, thaw, schedule=lambda step, total: 1 / (1 + step),
        optimizer_in_backward=in_backward,
    )  # fmt: skip
    assert not torch.equal(whole["0.weight"], _model()[0].weight)


class _Remembering(nn.Module):
    """Keeps the mean of each batch that it was trained on, and the mean of these."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()
        self.register_buffer("means", torch.zeros(0, 6))
        self.register_buffer("center", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.means = torch.cat([self.means, x.mean(0, keepdim=True)])
        self.center = self.means.mean(0)
        return self.inner(x - self.center)  # type: ignore[no-any-return]


def test_a_buffer_that_grows_or_comes_goes_on_as_it_was(open_run: Callable[..., Run]) -> None:
    _assert_goes_on(open_run, _Remembering)


class _Counting(nn.Module):
    """Keeps a number, and a tensor, beside its buffers, as torch has it for modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen, self.mean = _model(), 0, torch.zeros(6)

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self.mean}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.mean = state["seen"], state["mean"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen, self.mean = self.seen + 1, self.mean.lerp(x.mean(0), 0.1)
        return self.inner(x - self.mean) / self.seen  # type: ignore[no-any-return]


def test_the_extra_state_of_a_module_goes_on_as_it_was(open_run: Callable[..., Run]) -> None:
    _assert_goes_on(open_run, lambda: nn.Sequential(_Counting()))


class _Shampooish(torch.optim.Optimizer):
    """Keeps more than tensors of a parameter: a matrix for each of its dims, by what it does with them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                sizes = state.setdefault(
                    "sizes", {"per.dim": [torch.zeros(n, n) for n in p.shape], 1: (0, 1)}
                )
                for matrix in sizes["per.dim"]:
                    matrix.mul_(0.9).add_(p.grad.abs().mean())
                p.sub_(group["lr"] * p.grad / (1 + sum(matrix.mean() for matrix in sizes["per.dim"])))


def test_an_optimizer_that_keeps_lists_of_tensors_goes_on_with_them(open_run: Callable[..., Run]) -> None:
    _assert_goes_on(open_run, _model, optimizer=_Shampooish)


def test_what_a_model_is_made_of_does_not_change_on_the_way_but_a_mask_may(
    open_run: Callable[..., Run], tmp_path: Path
) -> None:
    def prune_some(trainer: Trainer) -> None:
        prune.l1_unstructured(trainer.model[0], "weight", amount=0.3)

    with pytest.raises(StokerError, match=r"(?s)0.weight_mask, 0.weight_orig new, 0.weight gone.*identity"):
        _assert_goes_on(open_run, _model, prune_some)
    shutil.rmtree(tmp_path / "runs")
    _assert_goes_on(open_run, lambda: nn.Sequential(prune.identity(_model()[0], "weight")), prune_some)


@pytest.mark.parametrize("ends", ["killed", "told to stop"])
def test_a_checkpoint_waits_for_the_update_of_gradients_that_several_steps_add_up(
    open_run: Callable[..., Run], ends: str
) -> None:
    def train(name: str, ends_in: int | None = None) -> tuple[int, dict[str, torch.Tensor]]:
        with open_run(name) as run:
            trainer = _trainer(run, _model(dropout=0.5), checkpoint_every=3)
            began = trainer.steps_done
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=12):
                trainer.backward(*_loss(trainer.forward(batch), batch))
                if run.step % 4 == 0:
                    trainer.update()
                if run.step == ends_in and ends == "killed":
                    raise _Dies
                if run.step == ends_in:
                    run.attempt.stop.ask("paused")
        return began, trainer.model.state_dict()

    _, whole = train("whole")
    with pytest.raises((_Dies, SystemExit)):
        train("cut", ends_in=7)
    began, resumed = train("cut")
    assert began == (4 if ends == "killed" else 8)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_loop_that_steps_its_optimizer_by_itself_is_saved_when_it_is_due(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), checkpoint_every=3)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=4):
            trainer.optimizer.zero_grad()
            trainer.backward(*_loss(trainer.forward(batch), batch))
            trainer.optimizer.step()
    assert [path.name for path in sorted(run.directory.checkpoints.iterdir())] == [
        "step-00000003", "step-00000004",
    ]  # fmt: skip


@pytest.mark.parametrize(("updates_every", "warnings"), [(0, 1), (90, 0)])
def test_an_update_that_is_forgotten_is_said_once(
    updates_every: int, warnings: int, open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), checkpoint_every=20)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=180):
            trainer.backward(*_loss(trainer.forward(batch), batch))
            if updates_every and trainer.every(updates_every):
                trainer.update()
    said = [one for one in caplog.messages if "call trainer.update() after trainer.backward(...)" in one]
    assert len(said) == warnings
    assert all("by step 100 no update has used the gradients of the last 100 steps" in one for one in said)


def test_a_parameter_that_is_not_the_models_has_no_name_in_a_checkpoint(open_run: Callable[..., Run]) -> None:
    def give_another(trainer: Trainer) -> None:
        trainer.optimizer.add_param_group({"params": nn.Linear(2, 3).parameters()})

    with pytest.raises(StokerError, match=r"shape \(3, 2\) that is not the model's.*part of the model"):
        _assert_goes_on(open_run, _model, give_another)


def test_a_part_that_is_frozen_once_the_trainer_has_it_is_trained_in_a_later_stage(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), optimizer=dict.fromkeys("04", torch.optim.Adam))
        first = trainer.model.get_submodule("0").requires_grad_(False)
        initial, weights = first.weight.detach().clone(), []
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=4):
            if trainer.steps_done == 2:
                weights.append(first.weight.detach().clone())
                first.requires_grad_(True)
            for name in "4" if trainer.steps_done < 2 else "04":
                trainer.backward(*_loss(trainer.forward(batch), batch))
                trainer.update(trainer.optimizers[name])
    assert torch.equal(weights[0], initial)
    assert not torch.equal(first.weight, initial)


def test_a_loss_that_asks_for_a_gradient_in_evaluation_is_told_so(open_run: Callable[..., Run]) -> None:
    def penalised(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        (gradient,) = torch.autograd.grad(output.sum(), output, create_graph=True)
        return output.square().sum() + gradient.square().sum(), len(output)

    with open_run() as run:
        trainer = _trainer(run, _model(), loss=penalised)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=1):
            trainer.step(batch)
        with pytest.raises(StokerError, match=r"evaluation records none: .*if torch.is_grad_enabled\(\):"):
            trainer.evaluate(_dataset(), batch_size=8)


def test_a_run_has_one_trainer(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        _trainer(run, _model())
        with pytest.raises(ValueError, match=r"one Trainer.* optimizer=\{'first': \.\.\., 'second'"):
            _trainer(run, _model())


def test_a_submodule_called_by_itself_computes_in_the_precision_of_a_forward_pass(
    open_run: Callable[..., Run],
) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with open_run(precision) as run:
            model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            trainer = Trainer(
                run, model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                training=Training(precision=precision),
            )  # fmt: skip
            x = torch.ones(1, 2)
            assert trainer.model[0](x).dtype == torch.float32
            with trainer.autocast():
                assert trainer.model[0](x).dtype == trainer.forward((x,)).dtype == dtype


def test_bf16_keeps_float32_weights(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        model = _model()
        trainer = _trainer(run, model, precision="bf16")
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=2):
            assert trainer.forward(batch).dtype == torch.bfloat16
            assert torch.isfinite(trainer.step(batch))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_of_damaged_checkpoints_each_is_named_and_the_one_before_them_is_taken(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    every = {"checkpoint_every": Duration(5, "step"), "keep_checkpoints": 9}
    with open_run() as run:
        trainer = _trainer(run, _model(), **every)
        whole = _run_on(trainer, 20)
    kept = run.directory.checkpoints
    shard = next((kept / "step-00000020").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (kept / "step-00000015" / "manifest.json").unlink()
    for file in (kept / "step-00000010").iterdir():
        file.unlink()
    with open_run() as run:
        trainer = _trainer(run, _model(), **every)
        assert trainer.steps_done == 5
        assert _run_on(trainer, 20) == whole[5:]
    passed_over = view.load(run.directory).attempts[-1].passed_over
    assert [reason.partition(":")[0] for reason in passed_over] == [f"step-{n:08d}" for n in (20, 15, 10)]


def _run_on(trainer: Trainer, steps: int) -> list[float]:
    loader = trainer.loader(_dataset(), batch_size=8)
    return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=steps)]


def test_the_newest_checkpoint_is_verified_from_the_opening_of_a_run_on(open_run: Callable[..., Run]) -> None:
    """While the model is built; what is asked for again is looked at again."""
    with open_run() as run:
        assert run.attempt.newest_checkpoint() == (None, [])
        _run_on(_trainer(run, _model()), 5)
    with open_run() as run:
        assert run.attempt._newest is not None
        found, _ = run.attempt._newest.result(60)
        assert found is not None
        assert found.step == 5
        shutil.rmtree(found.path)
        assert run.attempt.newest_checkpoint() == (found, [])
        assert run.attempt.newest_checkpoint() == (None, [])


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        _run_on(_trainer(run, _model()), 5)
        run.log(seen=1.0)
    shutil.rmtree(run.directory.checkpoints)
    with (
        pytest.raises(StokerError, match=r"the last at step 5, but none can be used .*holds none"),
        open_run() as run,
    ):
        _trainer(run, _model())
    assert view.load(run.directory).step == 5, "nothing of it is void"


def test_optimizers_whose_names_have_dots_go_on_with_their_state(open_run: Callable[..., Run]) -> None:
    def trained(run: Run, steps: int) -> Trainer:
        seed_everything(0)
        model = nn.ModuleDict({"nets": nn.ModuleDict({"g": nn.Linear(6, 3), "d": nn.Linear(6, 3)})})
        adam = lambda p: torch.optim.AdamW(p, lr=0.01)  # noqa: E731
        trainer = Trainer(
            run, model, optimizer={"nets.g": adam, "nets.d": adam}, training=Training(precision="fp32")
        )
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
            for name, optimizer in trainer.optimizers.items():
                for part in trainer.micro(batch):
                    trainer.backward(*_loss(model.get_submodule(name)(part[0]), part))
                trainer.update(optimizer)
        return trainer

    with open_run("whole") as run:
        whole = trained(run, 8).state_dict()
    with open_run("cut") as run:
        trained(run, 4)
    with open_run("cut") as run:
        for name, tensor in trained(run, 8).state_dict().items():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "optimizer is AdamW, but now it is SGD"),
        ({"0": torch.optim.AdamW}, "optimizers are main, but now they are 0"),
    ],
)
def test_a_checkpoint_of_other_optimizers_is_refused(
    open_run: Callable[..., Run], now: Any, said: str
) -> None:
    with open_run() as run:
        _run_on(_trainer(run, _model()), 2)
    with open_run() as run, pytest.raises(StokerError, match=said) as refused:
        _trainer(run, _model(), optimizer=now)
    assert manifest.says_unfit(str(refused.value))


def test_a_metric_that_was_not_a_number_is_remembered_over_a_resume(open_run: Callable[..., Run]) -> None:
    def stale(run: Run, steps: int) -> list[bool]:
        trainer, found = _trainer(run, _model(), checkpoint_every=Duration(1, "step")), []
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
            trainer.step(batch)
            run.log(val_loss=[0.5, math.nan, math.inf, 0.7, 0.8][run.step - 1])
            found.append(trainer.stale("val_loss", patience=3))
        return found

    with open_run("whole") as run:
        whole = stale(run, 5)
    with open_run("cut") as run:
        first = stale(run, 3)
    with open_run("cut") as run:
        assert first + stale(run, 5) == whole == [False, False, False, True, True]


def test_weights_that_are_not_finite_are_not_saved(open_run: Callable[..., Run]) -> None:
    """A gradient that nobody looked at has spoilt them; a run that looks goes on from before."""

    def spoils(run: Run, **settings: Any) -> Trainer:
        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            total, weight = _loss(output, batch)
            if run.step == 7:
                total = total + (total - total.detach()).abs().sqrt()  # of zero, whose slope there is none
            return total, weight

        return _trainer(run, _model(), loss=loss, checkpoint_every=Duration(5, "step"), **settings)

    with (
        open_run() as run,
        pytest.raises(StokerError, match=r"the weights are not finite since an earlier bad gradient"),
    ):
        _run_on(spoils(run), 12)
    assert [path.name for path in manifest.committed(run.directory.checkpoints)] == ["step-00000005"]
    with open_run("late") as run, pytest.raises(StokerError, match=r"step 7: .* is no longer finite"):
        _run_on(spoils(run), 7)
    with open_run() as run:
        trainer = spoils(run, on_bad_loss="rewind")
        assert trainer.steps_done == 5
        assert all(map(math.isfinite, _run_on(trainer, 12)))
    assert manifest.committed(run.directory.checkpoints)[-1].name == "step-00000012"


def _bad_at_15(run: Run, bad: float) -> Callable[[torch.Tensor, Any], tuple[torch.Tensor, int]]:
    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        total, weight = _loss(output, batch)
        return (total * bad if run.step == 15 else total), weight

    return loss


def _step_of_ones_own(trainer: Trainer, loss: Callable[..., tuple[torch.Tensor, int]], batch: Any) -> None:
    for part in trainer.micro(batch):
        trainer.backward(*loss(trainer.forward(part), part))
    trainer.update()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bad", [100, math.nan])
@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_a_spike_is_answered_as_a_loss_that_is_not_finite(
    policy: str, bad: float, own: bool, open_run: Callable[..., Run]
) -> None:
    """In `trainer.step`, and in a loop of one's own that adds up two losses."""
    with open_run() as run:
        loss = _bad_at_15(run, bad)

        trainer = _trainer(
            run, _model(), loss=None if own else loss, on_bad_loss=policy, spike=5.0, micro_batch=4,
            checkpoint_every=Duration(10, "step"),
        )  # fmt: skip
        weights = []

        def train() -> None:
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=20):
                _step_of_ones_own(trainer, loss, batch) if own else trainer.step(batch)
                weights.append(trainer.model[0].weight.detach().clone())

        if policy == "stop":
            said = "is nan" if math.isnan(bad) else "is .* times its running median"
            with pytest.raises(StokerError, match=f"step 15: the loss {said}"):
                train()
            return
        train()
    back_to = {"skip": 14, "rewind": 10}[policy]
    assert torch.equal(weights[15 - 1], weights[back_to - 1])
    assert not torch.equal(weights[16 - 1], weights[back_to - 1])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bad", [100, math.nan])
def test_a_batch_that_is_left_out_does_not_change_running_statistics(
    bad: float, own: bool, open_run: Callable[..., Run]
) -> None:
    with open_run() as run:
        loss = _bad_at_15(run, bad)

        trainer = _trainer(
            run, _model(), loss=None if own else loss, on_bad_loss="skip", spike=5.0, micro_batch=4
        )
        buffers = []
        for x, y in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=20):
            batch = (x * bad if run.step == 15 else x, y)
            _step_of_ones_own(trainer, loss, batch) if own else trainer.step(batch)
            buffers.append({name: b.clone() for name, b in trainer.model.named_buffers()})
    assert all(torch.equal(buffers[15 - 1][name], b) for name, b in buffers[14 - 1].items())
    assert not torch.equal(buffers[16 - 1]["1.running_mean"], buffers[15 - 1]["1.running_mean"])


class _Queue(nn.Module):
    """Buffers of all kinds: one grows, one is made in the first pass, one is expanded, one is a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _model()
        self.register_buffer("means", torch.zeros(0, 6))
        self.register_buffer("center", None)
        self.register_buffer("wide", torch.ones(1).expand(6), persistent=False)
        self.register_buffer("counts", torch.arange(12.0)[::2], persistent=False)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.cached = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.means = torch.cat([self.means, x.mean(0, keepdim=True)])
        self.center = self.means.mean(0)
        self.counts.add_(1)
        if len(self.means) > 14:
            self.cached, self.cache = 2, torch.zeros(2)
        return self.model(x * self.wide - self.center)  # type: ignore[no-any-return]


def test_buffers_of_any_kind_are_as_they_were_before_a_batch_that_is_left_out(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:

        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            total, weight = _loss(output, batch)
            return (total * math.nan if run.step in (1, 15) else total), weight

        trainer = _trainer(run, _Queue(), loss=loss, on_bad_loss="skip")
        seen = []
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=16):
            trainer.step(batch)
            seen.append((len(trainer.model.means), trainer.model.center, trainer.model.counts[0].item()))
    assert [means for means, _, _ in seen] == [0, *range(1, 14), 13, 14]
    assert seen[0][1] is None
    assert torch.equal(seen[14][1], seen[13][1])
    assert [half for _, _, half in seen] == [0, *range(1, 14), 13, 14]
    assert len(trainer.model.cache) == trainer.model.cached


def test_a_pass_that_ran_out_of_memory_does_not_change_running_statistics(
    open_run: Callable[..., Run],
) -> None:
    def run_on(limit: int) -> Any:
        passed: list[int] = []

        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            passed.append(len(output))
            if len(output) > limit and len(passed) > 5:  # it fitted when it was tried
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _loss(output, batch)

        with open_run(f"{limit}") as run:
            trainer = _trainer(run, _model(), loss=loss, micro_batch="auto" if limit < 8 else 4)
            _run_on(trainer, 1)
            return passed, dict(trainer.model.named_buffers())

    (passed, now), (_, without) = run_on(4), run_on(8)
    assert 8 in passed
    assert all(torch.equal(now[name], b) for name, b in without.items())


def test_batches_that_are_all_bad_end_the_run(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(
            run, _model(), loss=lambda output, batch: (_loss(output, batch)[0] * math.nan, 1),
            on_bad_loss="skip",
        )  # fmt: skip
        with pytest.raises(
            StokerError, match=r"step 11: .* as in the 10 steps before, so the batches are not the cause"
        ):
            _run_on(trainer, 50)


@pytest.mark.parametrize("dies_in", [None, 10])
def test_each_checkpoint_is_rewound_to_once(dies_in: int | None, open_run: Callable[..., Run]) -> None:
    """Also where the run was interrupted between two of them."""

    def train(run: Run, dies_in: int | None = None) -> None:
        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            total, weight = _loss(output, batch)
            return (total * math.nan if run.step >= 8 else total), weight

        often = Duration(3, "step")
        trainer = _trainer(
            run, _model(), loss=loss, on_bad_loss="rewind", checkpoint_every=often, keep_checkpoints=9
        )
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=50):
            trainer.step(batch)
            if run.step == dies_in:
                raise _Dies

    if dies_in is not None:
        with pytest.raises(_Dies), open_run() as run:
            train(run, dies_in)
    with (
        pytest.raises(StokerError, match=r"step 12: there is no checkpoint left to rewind to"),
        open_run() as run,
    ):
        train(run)
    events = [e for b in journal.read_blocks(run.directory.journal) for e in b.events]
    rewound = {event["step"]: event["to"] for event in events if event["type"] == "rewound"}
    assert rewound == {8: 6, 9: 3, 10: 9, 11: 0}, "that of step 9 was taken meanwhile"


def test_bad_steps_of_a_loop_of_its_own_are_counted_where_they_follow_one_another(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), on_bad_loss="skip")
        loader = trainer.loader(_dataset(), batch_size=8)
        for batch in trainer.steps(loader, max_steps=30):
            for part in trainer.micro(batch):
                total, weight = _loss(trainer.forward(part[0]), part)
                trainer.backward(total * math.nan if run.step % 2 else total, weight)
            trainer.update()
    assert trainer.steps_done == 30


def test_memory_that_a_cpu_has_not_is_said_with_what_to_change(open_run: Callable[..., Run]) -> None:
    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        if len(output) > 2:
            torch.empty(10**14)
        return _loss(output, batch)

    with open_run("fixed") as run:
        trainer = _trainer(run, _without_batch_norm(), loss=loss, micro_batch=4)
        with pytest.raises(
            OutOfMemory, match=r"Tried to allocate [\d,.]+ TiB\. .* are free\. Use micro_batch=2, which"
        ):
            _run_on(trainer, 2)
    with open_run("auto") as run:
        assert len(_run_on(_trainer(run, _without_batch_norm(), loss=loss, micro_batch="auto"), 2)) == 2


def test_a_config_that_the_checkpoint_does_not_fit_changes_nothing_of_the_run(tmp_path: Path) -> None:
    def attempt(width: int, *, accept: bool = False) -> Run:
        config = dataclasses.make_dataclass("Config", [("width", int)], frozen=True)(width)
        with Run("test", "a", runs=tmp_path, config=config, accept_drift=accept) as run:
            model = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))
            _run_on(_trainer(run, model), 2 + run.attempt.number)
        return run

    attempt(8)
    with pytest.raises(StokerError, match="with a different shape"):
        attempt(16, accept=True)
    assert view.load(attempt(8).directory).config == {"width": 8}


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda out, batch: cross_entropy(out, batch[1]), r"a Tensor of shape \(\): .*two values"),
        (
            lambda out, batch: (cross_entropy(out, batch[1], reduction="none"), len(out)),
            r"\(10,\) and a int: ",
        ),
        (lambda out, batch: None, "loss returned a NoneType: "),
    ],
)
def test_a_loss_that_returns_something_else_is_told_what_to_return(
    open_run: Callable[..., Run], loss: Any, said: str
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), loss=loss)
        batch = next(trainer.steps(trainer.loader(_dataset(), batch_size=10), max_steps=1))
        with pytest.raises(TypeError, match=said):
            trainer.step(batch)
        run.end(FAILED)


def test_a_config_that_is_no_training_is_told_to_inherit_from_it(open_run: Callable[..., Run]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        lr: float = 0.1

    with open_run() as run, pytest.raises(TypeError, match="let Config inherit from it"):
        Trainer(run, _model(), optimizer=torch.optim.SGD, loss=_loss, training=Config())  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [{"epochs": 0}, {"epochs": -1}, {"epochs": math.nan}, {"max_steps": 0}])
def test_no_length_of_training_is_refused(open_run: Callable[..., Run], length: dict[str, Any]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        with pytest.raises(BadInput, match="must be more than 0"):
            next(trainer.steps(trainer.loader(_dataset(), batch_size=10), **length))


@pytest.mark.parametrize(("samples", "share", "warns"), [(50, 1.0, False), (40, 1.0, True), (50, 0.5, False)])
def test_going_on_with_another_number_of_samples_is_said(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, samples: int, share: float, warns: bool
) -> None:
    caplog.set_level(logging.WARNING, "stoker")
    for size, part, steps in [(50, 1.0, 2), (samples, share, 4)]:
        with open_run(config=Training(data_share=part), accept_drift=True) as run:
            trainer = _trainer(run, _model(), data_share=part)
            for batch in trainer.steps(trainer.loader(_dataset(size), batch_size=10), max_steps=steps):
                trainer.step(batch)
    said = "an epoch had 50 samples and has 40 now: from step 2 on the samples come in a different order"
    assert (said in caplog.messages) == warns


def test_a_checkpoint_that_is_asked_for_in_the_body_is_of_the_whole_step(
    open_run: Callable[..., Run],
) -> None:
    def train(name: str, dies: bool) -> nn.Module:
        with open_run(name) as run:
            model = _model(dropout=0.5)
            trainer = _trainer(run, model, checkpoint_every="10h")
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=9):
                if run.step == 3:
                    trainer.checkpoint()
                run.log(loss=trainer.step(batch))
                if run.step == 5:
                    trainer.checkpoint()
                if run.step == 6 and dies:
                    raise _Dies
        return model

    whole = train("whole", dies=False).state_dict()
    with pytest.raises(_Dies):
        train("dies", dies=True)
    with open_run("dies") as run:
        assert [manifest.step_of(path) for path in manifest.committed(run.directory.checkpoints)] == [3, 5]
    resumed = train("dies", dies=False).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(("micro_batch", "most"), [(None, 20), (3, 3), ("auto", 1)])
def test_an_evaluation_computes_no_more_at_once_than_a_step(
    open_run: Callable[..., Run], micro_batch: Any, most: int
) -> None:
    model, sizes = _model(), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with open_run() as run:
        trainer = _trainer(run, model, micro_batch=micro_batch)
        found = trainer.evaluate(_dataset(), batch_size=20)
    assert max(sizes) == most
    assert sum(sizes) == len(_dataset())
    with open_run("b") as run:
        assert found == pytest.approx(_trainer(run, _model()).evaluate(_dataset(), batch_size=50), rel=1e-6)


def test_a_length_that_the_run_is_past_is_said_and_the_run_is_as_long_as_it_was(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stoker")
    for steps in (4, 1):
        with open_run() as run:
            trainer = _trainer(run, _model())
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                run.log(loss=trainer.step(batch))
    assert "a length of 1 is over already: the run is at step 4" in caplog.messages
    found = view.load(run.directory)
    assert (found.step, found.total_steps) == (4, 4)


def test_a_loop_that_is_left_is_saved_as_it_is_and_one_that_failed_is_not(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    def train(name: str, leave: Callable[[], bool]) -> nn.Module:
        with open_run(name) as run:
            model = _model()
            trainer = _trainer(run, model)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=9):
                run.log(loss=trainer.step(batch))
                if run.step == 4 and leave():
                    break
        return model

    with caplog.at_level(logging.INFO):
        model = train("left", lambda: True)
    assert "the loop was left at step 4 of 9" in caplog.text
    with open_run("left") as run:
        assert run.step == 4
        (saved, _) = run.attempt.newest_checkpoint()
        assert saved is not None
        assert (saved.step, saved.samples) == (4, 32)
        weights = load_file(store.export_model(saved, run.directory.artifacts / "model.safetensors"))
    assert torch.equal(weights["0.weight"], model.state_dict()["0.weight"])
    with pytest.raises(ZeroDivisionError):
        train("failed", lambda: bool(1 / 0))
    assert not list((run.directory.path.parent / "failed").glob("checkpoints/*/manifest.json"))


@pytest.mark.parametrize(("log_at", "ends_at"), [((), 3), ((2,), 3), ((), 9), ((5,), 9), ((10,), 9)])
def test_a_run_ends_at_the_step_that_was_trained_whatever_was_logged(
    open_run: Callable[..., Run], log_at: tuple[int, ...], ends_at: int
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=9):
            loss = trainer.step(batch)
            if run.step in log_at:
                run.log(loss=loss)
            if run.step == ends_at:
                break
        for step in log_at:
            run.log({"more": 1.0}, step=step)
    assert view.load(run.directory).step == ends_at


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_that_failed_within_a_step_ends_at_the_last_one_that_was_trained(
    open_run: Callable[..., Run], trained: bool
) -> None:
    with contextlib.suppress(ZeroDivisionError), open_run() as run:
        trainer = _trainer(run, _model())
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=9):
            if run.step < 3 or trained:
                trainer.step(batch)
            if run.step == 3:
                raise ZeroDivisionError
    assert view.load(run.directory).step == 2 + trained


def test_a_run_that_fails_before_it_resumes_keeps_its_step(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), checkpoint_every=3)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=6):
            trainer.step(batch)
    with contextlib.suppress(ZeroDivisionError), open_run() as run:
        raise ZeroDivisionError
    assert view.load(run.directory).step == 6
    assert run.step == 6


def test_a_loop_that_is_left_before_its_step_is_saved_without_it(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=9):
            if run.step == 4:
                break
            run.log(loss=trainer.step(batch))
    (saved, _) = run.attempt.newest_checkpoint()
    assert saved is not None
    assert (saved.step, saved.samples) == (3, 24)


def test_a_second_loop_with_nothing_left_is_refused_and_one_that_goes_further_is_not(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        loader = trainer.loader(_dataset(), batch_size=8)
        for steps in (2, 5):
            for batch in trainer.steps(loader, max_steps=steps):
                trainer.step(batch)
        assert trainer.steps_done == 5
        with pytest.raises(
            ValueError, match=r"steps\(\) of 3 .*the run is at step 5, .*counts from the start of the run"
        ):
            next(trainer.steps(loader, max_steps=3))
    with open_run() as run:  # which comes to loops that are over
        trainer = _trainer(run, _model())
        loader = trainer.loader(_dataset(), batch_size=8)
        assert [list(trainer.steps(loader, max_steps=steps)) for steps in (2, 5)] == [[], []]


@pytest.mark.soak
def test_several_loops_resume_in_the_one_that_the_run_was_in(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    """With the random state that it had there, also where something was drawn between the loops."""

    def weights(run: Run, until: int) -> dict[str, torch.Tensor]:
        trainer = _trainer(run, _model(dropout=0.5), checkpoint_every=Duration(1, "step"))
        for size, steps in ((50, 3), (40, 6), (50, 9)):
            torch.randn(size)
            for batch in trainer.steps(trainer.loader(_dataset(size), batch_size=8), max_steps=steps):
                trainer.step(batch)
                if run.step == until:
                    run.attempt.stop.ask("preempted")
        return trainer.state_dict()

    with open_run("whole") as run:
        whole = weights(run, 99)
    for until in (2, 3, 5, 6, 8) if SOAK else (3, 8):
        with contextlib.suppress(SystemExit), open_run(f"cut-{until}") as run:
            weights(run, until)
        with caplog.at_level(logging.WARNING, "stoker"), open_run(f"cut-{until}") as run:
            found = weights(run, 99)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()), until
    assert "different order" not in caplog.text


@pytest.mark.soak
@pytest.mark.parametrize(
    ("lengths", "leaves"),
    [(({"epochs": 1}, {"epochs": 2}), None), (({"max_steps": 20}, {"max_steps": 9}), 4)],
)
def test_a_loop_that_another_one_followed_is_over_after_a_restart_in_that_one(
    open_run: Callable[..., Run], lengths: Sequence[dict[str, Any]], leaves: int | None
) -> None:
    """Whether it came to its end or was left, with the random state of the second loop."""

    def train(name: str, until: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        steps: list[list[int]] = [[], []]
        with open_run(name) as run:
            trainer = _trainer(run, _model(dropout=0.5), checkpoint_every=Duration(2, "step"))
            loader = trainer.loader(_dataset(48), batch_size=8)
            for made, length in zip(steps, lengths, strict=True):
                torch.randn(len(made) + 3)
                for batch in trainer.steps(loader, **length):
                    run.log(loss=trainer.step(batch))
                    made.append(run.step)
                    if run.step == leaves and made is steps[0]:
                        break
                    if run.step == until:
                        raise _Dies
        return trainer.state_dict(), [len(made) for made in steps]

    whole, made = train("whole", 99)
    assert made == [leaves or 6, 12 - 6 if leaves is None else 9 - leaves]
    assert len(view.load(open_run("whole").directory).points["loss"]) == sum(made)
    for until in range(1, sum(made)) if SOAK else (made[0], made[0] + 1, sum(made) - 1):
        if until == leaves:
            continue
        with pytest.raises(_Dies):
            train(f"cut-{until}", until)
        found, _ = train(f"cut-{until}", 99)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()), until


def test_a_length_in_epochs_is_of_samples_whatever_the_batches_are(open_run: Callable[..., Run]) -> None:
    for size, left_at in ((10, 100), (25, 0)):
        with open_run() as run:
            trainer = _trainer(run, _model())
            for batch in trainer.steps(trainer.loader(_dataset(50), batch_size=size), epochs=3):
                trainer.step(batch)
                if trainer.samples_done + size == left_at:
                    break
    assert (trainer.steps_done, trainer.samples_done) == (12, 150)


@pytest.mark.parametrize(("goal", "asked", "watched", "best"), [
    ("min", True, False, 8), ("max", True, False, 8), ("min", None, True, 8), ("min", None, False, 11),
    ("min", False, True, 11),
])  # fmt: skip
def test_the_best_is_of_the_weights_that_were_measured_where_asked_or_watched(
    open_run: Callable[..., Run], goal: Any, asked: bool | None, watched: bool, best: int
) -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 0.5, 10: 0.7}
    measured = {}

    def train(until: int) -> None:
        with open_run() as run:
            run.goal(score=goal)
            model = _model()
            trainer = _trainer(run, model, best="score", checkpoint_best=asked, keep_checkpoints=1)
            if not run.step:
                run.log(score=-9.0 if goal == "min" else 9.0)  # of weights that are never saved
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=until):
                run.log(loss=trainer.step(batch))
                if run.step in values:
                    run.log(score=values[run.step] * (1 if goal == "min" else -1))
                    measured[run.step] = copy.deepcopy(model.state_dict())
                    assert not (watched and trainer.stale("score", patience=9))

    train(5)
    train(11)
    found = manifest.best(open_run().directory.checkpoints, "score", goal)
    assert found is not None
    assert manifest.step_of(found) == best
    if best in measured:
        weights = load_file(store.export_model(manifest.read(found), found.parent / "best.safetensors"))
        assert torch.equal(weights["0.weight"], measured[best]["0.weight"])


@pytest.mark.parametrize("decay", [None, 0.5])
def test_after_the_loop_the_best_weights_are_tested(
    open_run: Callable[..., Run], decay: float | None
) -> None:
    """Also where the run is continued, and without a trace in what it goes on from."""
    values, seen = {2: 3.0, 4: 1.0, 6: 2.0}, {}

    def train(until: int) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with open_run("a") as run:
            run.goal(score="min")
            trainer = _trainer(run, _model(), best="score", checkpoint_best=True, ema=Ema(decay=decay))
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=until):
                run.log(loss=trainer.step(batch))
                if run.step in values:
                    run.log(score=values[run.step])
                    seen[run.step] = trainer.state_dict()
            last = trainer.state_dict()
            step = trainer.load_best()
            trainer.checkpoint()
            with pytest.raises(ValueError, match="after the last loop"):
                next(iter(trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=99)))
            return step, trainer.state_dict(), last

    for until in (7, 7, 9):
        step, weights, last = train(until)
        assert step == 4
        assert weights.keys() == seen[4].keys()
        assert all(torch.equal(weights[name], seen[4][name]) for name in weights)
    with open_run("b") as run:
        whole = _trainer(run, _model(), ema=Ema(decay=decay))
        for batch in whole.steps(whole.loader(_dataset(), batch_size=8), max_steps=9):
            whole.step(batch)
    assert all(torch.equal(tensor, last[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("before", [0.5, 1.0, math.nan])
def test_that_no_training_was_better_than_the_best_is_said(
    open_run: Callable[..., Run], before: float, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        run.goal(score="min")
        trainer = _trainer(run, _model(), best="score", checkpoint_best=True)
        run.log(score=before)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=2):
            run.log(loss=trainer.step(batch), score=1.0 / run.step + 0.3)
        assert trainer.load_best() == 2
    said = "score was better before training, 0.5, than at any checkpoint, of which the best has 0.8"
    assert (said in caplog.text) == (before == 0.5)


def test_what_is_logged_before_the_trainer_is_no_step_of_its(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        run.log(parameters=10)
        trainer = _trainer(run, _model())
        assert run.step == 0
        run.log(val_loss=2.0)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=2):
            run.log(loss=trainer.step(batch), val_loss=float(run.step))
    assert view.load(run.directory).points["val_loss"].items() == {0: 2.0, 1: 1.0, 2: 2.0}.items()
    assert "run.log was called before the Trainer was created" in caplog.text
    caplog.clear()
    with open_run("b") as run:
        run.log({"parameters": 10}, step=0)
        _trainer(run, _model())
    assert "before the Trainer" not in caplog.text


def test_best_weights_that_there_are_not_are_said(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=2):
            trainer.step(batch)
            with pytest.raises(ValueError, match="within a loop"):
                trainer.load_best()
        with pytest.raises(StokerError, match="no checkpoint has the metric val_loss"):
            trainer.load_best()


@pytest.mark.parametrize(
    ("metric", "best", "said"),
    [
        (
            "score",
            "score",
            r"its metric score is not known to be better low or high: .*run.goal\(score=\"max\"\)",
        ),
        ("eval_loss", "val_loss", "its metric val_loss was not logged: name .*; did you mean 'eval_loss'"),
        ("val_loss", "val_loss", ""),
    ],
)
def test_a_best_checkpoint_that_cannot_be_told_is_warned_of_once(
    metric: str, best: str, said: str, open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model(), best=best, checkpoint_best=True)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=4):
            run.log({metric: trainer.step(batch).item()})
    warned = [text for text in caplog.messages if "no best checkpoint is kept" in text]
    assert len(warned) == bool(said)
    assert not said or re.search(said, warned[0])


class _Graph(nn.Module):
    """A model with a sparse matrix, as those of graphs have."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.model = _model()
        self.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=persistent)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)},
         "optimizer= is an object of type SGD.*optimizer=lambda parameters: SGD"),
        ({"optimizer": {"0": "adam"}}, "optimizer= is 'adam' for '0'.*optimizer={'0': lambda parameters"),
        ({"loss": nn.CrossEntropyLoss()}, r"loss= is .* CrossEntropyLoss: give .*\(output, batch\) -> \(sum"),
        ({"loss": cross_entropy}, r"loss= is cross_entropy: give a function \(output, batch\)"),
        ({"schedule": "cosine"}, r"schedule= is 'cosine': give a function \(step, total steps\)"),
        ({"schedule": lambda step: 1.0}, "schedule= is <lambda>, which does not take these"),
        ({"optimizer": lambda _: torch.optim.SGD(nn.Linear(2, 3).parameters())},
         r"a parameter of shape \(3, 2\) that is not the model's.*group them within optimizer="),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure .*: use an optimizer that steps without"),
        ({"model": nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))},
         r"have no shape yet \(0.weight, 0.bias\): call it once on a batch"),
        ({"model": _Graph(persistent=True)},
         r"sparse tensors \(adjacency\), which a checkpoint cannot hold: .* buffers with persistent=False"),
        ({"model": [nn.Linear(6, 3)]}, r"of type list, but must be .*: put several .*ModuleDict\(\{"),
        ({"model": nn.Flatten}, r"the model is Flatten, but must be .*: give an instance, Flatten\(\."),
        ({"optimizer": {"gen": torch.optim.Adam}, "model": nn.ModuleDict({"genes": nn.Linear(6, 3)})},
         "names 'gen', but ModuleDict has no such submodule; did you mean 'genes'.* it has genes"),
        ({"optimizer": {"2": torch.optim.Adam}}, "names '2', which has no parameters: leave it out"),
        ({"optimizer": dict.fromkeys("01", torch.optim.Adam),
          "model": nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3))},
         r"names '0', whose parameters are all frozen: .*get_submodule\('0'\)\.requires_grad_\(False\)"),
    ],
)  # fmt: skip
def test_an_argument_of_another_kind_is_refused_with_what_to_give(
    given: dict[str, Any], said: str, open_run: Callable[..., Run]
) -> None:
    with open_run() as run, pytest.raises(BadInput, match=said):
        Trainer(run, **{"model": _model(), "optimizer": torch.optim.Adam, "loss": _loss, **given})


def test_a_compiled_wrapper_is_refused_and_a_model_that_compiled_itself_keeps_its_names(
    open_run: Callable[..., Run],
) -> None:
    model = _model()
    said = r"what torch.compile has returned.*model.compile\(\)"
    with open_run() as run, pytest.raises(BadInput, match=said):
        _trainer(run, torch.compile(model, backend="eager"))
    names = [name for name, _ in model.named_parameters()]
    model.compile(backend="eager")
    with open_run() as run:
        assert [name for name, _ in _trainer(run, model).model.named_parameters()] == names


def test_a_sparse_buffer_that_no_checkpoint_holds_is_taken_in_a_shared_part_too(
    open_run: Callable[..., Run],
) -> None:
    model = _Graph(persistent=False)
    model.again = model.part = nn.Module()
    model.part.register_buffer("adjacency", model.adjacency, persistent=False)
    model.forward = model.model.forward  # type: ignore[method-assign]
    with open_run() as run:
        assert len(_run_on(_trainer(run, model), 2)) == 2


def test_a_loss_that_is_a_module_of_ones_own_is_taken(open_run: Callable[..., Run]) -> None:
    class Loss(nn.Module):
        def forward(self, output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
            return _loss(output, batch)

    with open_run() as run:
        trainer = Trainer(run, _model(), optimizer=torch.optim.Adam, loss=Loss())
        assert len(_run_on(trainer, 2)) == 2


def test_batches_come_of_steps_over_a_loader_of_the_trainer(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, _model())
        with pytest.raises(BadInput, match=r"given a DataLoader.*make a loader .*trainer.loader\(dataset"):
            next(trainer.steps(DataLoader(_dataset()), epochs=1))  # type: ignore[arg-type]
        with pytest.raises(BadInput, match=r"for batch in trainer.steps\(loader, epochs="):
            next(iter(trainer.loader(_dataset(), batch_size=10)))


class _OfItems(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(2, 1), fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise TypeError("of its own")
        return self.layer(x)


def test_a_model_that_takes_not_all_of_a_batch_is_to_be_told_which(open_run: Callable[..., Run]) -> None:
    samples = [{"x": torch.ones(2), "y": torch.ones(1)} for _ in range(4)]
    with open_run() as run:
        trainer = Trainer(run, _OfItems(), optimizer=torch.optim.Adam, loss=_loss)
        said = r'_OfItems was called with x, y, .* but takes x: .*inputs=lambda batch: \{"x": batch\["x"\]\}'
        with pytest.raises(BadInput, match=said):
            trainer.step(next(trainer.steps(trainer.loader(samples, batch_size=2), epochs=1)))


def test_an_error_of_a_models_own_stays_what_it_is(open_run: Callable[..., Run]) -> None:
    samples = [{"x": torch.ones(2)} for _ in range(4)]
    with open_run() as run:
        trainer = Trainer(run, _OfItems(fails=True), optimizer=torch.optim.Adam, loss=_loss)
        with pytest.raises(TypeError, match="of its own"):
            trainer.step(next(trainer.steps(trainer.loader(samples, batch_size=2), epochs=1)))
