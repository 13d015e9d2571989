"""What `Training` sets, in one process: precision, memory, averages, micro-batches, early stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stoker import BadInput, Run, Trainer, Training, distributed
from stoker.duration import Duration
from stoker.engine import (
    deepspeed_file,
    device,
    memory,
    micro_batch,
    optimizers,
    options,
    rehearsal,
    schedule,
    strategies,
)
from stoker.engine.loss_scale import LossScale
from stoker.engine.random_state import seed_everything
from stoker.engine.settings import DeepSpeed, Ema, Fsdp, Pipeline
from stoker.errors import StokerError
from stoker.world import World
from strategies_run import Images, Rows, image_loss, inputs, llama, resnet, token_loss
from torch import nn

from support import SOAK


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda name="a": Run("test", name, runs=tmp_path / "runs")


def _trainer(run: Run, **settings: Any) -> Trainer:
    return Trainer(
        run, llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=inputs, loss=token_loss,
        training=Training(**{"precision": "fp32", **settings}),
    )  # fmt: skip


def _losses(trainer: Trainer, steps: int = 4) -> list[float]:
    loader = trainer.loader(Rows(), batch_size=8)
    return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=steps)]


@pytest.fixture
def plain(open_run: Callable[..., Run]) -> list[float]:
    with open_run("plain") as run:
        return _losses(_trainer(run))


@pytest.mark.parametrize("how", ["full", "2", "selective"])
def test_recomputed_activations_change_no_loss(
    how: str, plain: list[float], open_run: Callable[..., Run]
) -> None:
    with open_run() as run:
        trainer = _trainer(run, activation_checkpointing=how)
        ran: list[str] = []
        for name, module in trainer.model.named_modules():
            if name.endswith("mlp"):
                module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        assert _losses(trainer) == pytest.approx(plain, rel=1e-6)
    blocks = 4 if how in ("full", "selective") else 2
    assert len(ran) == 4 * (4 + blocks), "each forward pass once, and recomputed blocks once more"


def test_an_optimizer_in_the_backward_pass_changes_no_loss_and_keeps_no_gradients(
    plain: list[float], open_run: Callable[..., Run]
) -> None:
    with open_run() as run:
        trainer = _trainer(run, optimizer_in_backward=True, checkpoint_every=Duration(2, "step"))
        parameters = list(trainer.model.parameters())
        kept: list[int] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: kept.append(sum(p.grad is not None for p in parameters))
            )
        assert _losses(trainer) == pytest.approx(plain, rel=1e-6)
        assert kept == [0] * 4 * len(parameters)
        whole = trainer.state_dict()
        with pytest.raises(StokerError, match=r"use that method, or omit"):
            trainer.backward(torch.zeros(()), 1.0)
    shutil.rmtree(run.directory.checkpoints / "step-00000004")
    with open_run() as run:
        again = _trainer(run, optimizer_in_backward=True)
        assert again.steps_done == 2
        _losses(again)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, whole[name]), name


class _Harmonic(torch.optim.Optimizer):
    """Counts its steps in its groups, as schedule-free optimizers do, and makes ever smaller ones."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["steps"])


def test_what_an_optimizer_counts_in_its_groups_it_counts_in_the_backward_pass_too(
    open_run: Callable[..., Run],
) -> None:
    def train(name: str, steps: int, in_backward: bool) -> list[float]:
        with open_run(name) as run:
            trainer = Trainer(
                run, llama(), optimizer=_Harmonic, inputs=inputs, loss=token_loss,
                training=Training(precision="fp32", optimizer_in_backward=in_backward),
            )  # fmt: skip
            losses = _losses(trainer, steps)
            assert trainer.optimizer.param_groups[0]["steps"] == steps
        return losses

    plain = train("plain", 6, in_backward=False)
    cut = [*train("cut", 4, in_backward=True), *train("cut", 6, in_backward=True)]
    assert cut == pytest.approx(plain, rel=1e-6)


def test_an_optimizer_in_the_backward_pass_leaves_weights_as_they_are_where_the_loss_is_bad(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        trainer = Trainer(
            run, llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=inputs,
            loss=lambda output, batch: (token_loss(output, batch)[0] * math.nan, 1.0),
            training=Training(precision="fp32", optimizer_in_backward=True),
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with pytest.raises(StokerError, match="the weights are those from before this step"):
            _losses(trainer)
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "setting", [{"clip_norm": 1.0}, {"micro_batch": 2}, {"parallel": "fsdp"}, {"on_bad_loss": "skip"}]
)
def test_what_needs_all_gradients_does_not_go_with_it(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(BadInput, match=rf"cannot be combined with {name}="):
        options.check(Training(optimizer_in_backward=True, **setting), ranks=1, gpus=0)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


def _compiled_or_not(run: Run, kind: str, compiled: bool) -> list[float]:
    seed_everything(0)
    made: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)}
    training = Training(precision="fp32", compile=compiled)
    if kind == "llama":
        return _losses(Trainer(run, llama(), inputs=inputs, loss=token_loss, training=training, **made))
    trainer = Trainer(
        run, nn.Sequential(*(_Block() for _ in range(3))), inputs=lambda x: (x,),
        loss=lambda output, x: (output.square().sum(), len(x)), training=training, **made,
    )  # fmt: skip
    loader = trainer.loader(torch.linspace(-1, 1, 512).reshape(64, 8), batch_size=8)
    return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=4)]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["plain", "llama"] if SOAK else ["plain"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_change_no_loss(kind: str, open_run: Callable[..., Run]) -> None:
    """Each operation takes the compiler seconds: of Llama's see tests/language/test_compiled.py too."""
    losses = []
    for compiled in (False, True):
        with open_run(f"{compiled}") as run:
            losses.append(_compiled_or_not(run, kind, compiled))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_blocks_to_recompute_must_exist(open_run: Callable[..., Run]) -> None:
    with open_run() as run, pytest.raises(BadInput, match="no repeated blocks found"):
        Trainer(
            run, nn.Linear(2, 2), optimizer=torch.optim.AdamW,
            training=Training(activation_checkpointing="full"),
        )  # fmt: skip


def test_an_overflow_skips_the_step_and_halves_the_scale(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, precision="fp16")
        before = [p.detach().clone() for p in trainer.model.parameters()]
        scales = []
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=2):
            if run.step == 1:
                trainer._fit_scale([batch])
                trainer._scale.value = 2.0**40  # every gradient overflows fp16
            trainer.step(batch)
            scales.append(trainer._scale.value)
            same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
            assert same
        assert scales == [2.0**39, 2.0**38]


def test_a_gradient_that_fp16_would_lose_is_kept_by_scaling(open_run: Callable[..., Run]) -> None:
    """A loss so small that gradients of single weights are below fp16's smallest number, 6e-8."""

    def faint(output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, weight = token_loss(output, batch)
        return total * 1e-5, weight

    def moved(name: str, precision: Any, scale: float | None = None) -> torch.Tensor:
        with open_run(name) as run:
            trainer = Trainer(
                run, llama(), optimizer=lambda p: torch.optim.SGD(p, lr=1e5), inputs=inputs, loss=faint,
                training=Training(precision=precision),
            )  # fmt: skip
            weight = trainer.model.get_parameter("model.layers.0.mlp.down_proj.weight")
            before = weight.detach().clone()
            for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=1):
                if scale is not None:
                    trainer._scale.value, trainer._scale.divisor = scale, 64.0
                trainer.step(batch)
            return (weight.detach() - before).flatten()

    exact = moved("fp32", "fp32")
    assert torch.cosine_similarity(moved("fp16", "fp16"), exact, dim=0) > 0.999
    assert torch.cosine_similarity(moved("bf16", "bf16"), exact, dim=0) > 0.99
    unscaled = moved("unscaled", "fp16", scale=1.0)
    assert (unscaled == 0).float().mean() > 0.5, "without scaling most of it is lost"


def test_a_scale_is_doubled_after_enough_good_steps_and_comes_back_from_its_state() -> None:
    scale = LossScale(True, initial=8.0, patience=3)
    scale.fit(1000.0)
    assert scale.divisor == 1024.0
    for _ in range(3):
        scale.update(overflowed=False)
    assert scale.value == 16.0
    scale.update(overflowed=False)
    scale.update(overflowed=True)
    assert scale.value == 8.0
    again = LossScale(True)
    again.restore(scale.state())
    assert again.state() == scale.state()
    assert LossScale(False).factor == 1.0


def test_an_average_follows_the_weights_and_is_what_is_evaluated(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run, ema=Ema(decay=0.5, warmup=False))
        expected = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=3):
            trainer.step(batch)
            for name, p in trainer.model.named_parameters():
                expected[name].lerp_(p.detach(), 0.5)
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        for name, tensor in trainer.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])
        with_average = trainer.evaluate(Rows(), batch_size=8)
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                assert torch.equal(p, weights[name]), "the weights are back"
                p.copy_(expected[name])
        trainer._ema = None
        assert trainer.evaluate(Rows(), batch_size=8) == with_average


def test_an_average_that_is_switched_on_later_begins_with_the_weights_of_then(
    open_run: Callable[..., Run],
) -> None:
    with open_run() as run:
        _losses(_trainer(run), 3)
    with open_run() as run:
        trainer = _trainer(run, ema=Ema(decay=0.9999))
        assert trainer.steps_done == 3
        for name, p in trainer.model.named_parameters():
            assert torch.equal(trainer._ema.values[name], p), name  # type: ignore[union-attr]


def test_an_average_moves_once_a_step_of_its_weights_optimizer(open_run: Callable[..., Run]) -> None:
    """Of several optimizers each moves the average of what it trains."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    with open_run() as run:
        trainer = Trainer(
            run, model, optimizer={"0": sgd, "1": sgd}, inputs=lambda b: (b[0],),
            training=Training(precision="fp32", ema=Ema(decay=0.5, warmup=False)),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.ones(8, 2))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for batch in trainer.steps(trainer.loader(data, batch_size=8), max_steps=1):
            for name in ("0", "1"):
                for part in trainer.micro(batch):
                    trainer.backward(trainer.forward(part).square().sum(), len(part[0]))
                trainer.update(trainer.optimizers[name])
        for name, value in trainer.state_dict().items():
            torch.testing.assert_close(value, (before[name] + model.get_parameter(name).detach()) / 2)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputing_batch_norm_counts_its_statistics_once(how: str, open_run: Callable[..., Run]) -> None:
    found = []
    for recompute in ("none", how):
        with open_run(recompute) as run:
            trainer = Trainer(
                run, resnet(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), inputs=lambda b: (b[0],),
                loss=image_loss, training=Training(precision="fp32", activation_checkpointing=recompute),
            )  # fmt: skip
            loader = trainer.loader(Images(), batch_size=16)
            losses = [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=3)]
            found.append((losses, trainer.state_dict()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, msg=name)


def test_a_batch_that_weighs_nothing_has_a_loss_of_zero(open_run: Callable[..., Run]) -> None:
    """As where no token of any row is to be learned."""
    with open_run() as run:
        trainer = _trainer(run)
        rows = [{**Rows()[n], "labels": torch.full_like(Rows()[n]["labels"], -100)} for n in range(8)]
        for batch in trainer.steps(trainer.loader(rows, batch_size=8), max_steps=1):
            assert trainer.step(batch).item() == 0.0
        assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_an_automatic_micro_batch_is_found_remembered_and_leaves_no_trace(
    plain: list[float], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    tried: list[int] = []
    rehearse = rehearsal.rehearse
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: (tried.append(given[-1]), rehearse(*given)))
    for name in ("first", "second"):
        with open_run(name) as run:
            assert _losses(_trainer(run, micro_batch="auto")) == pytest.approx(plain, rel=1e-6)
    assert tried == [1, 2, 4, 8], "the second run knew"


def test_memory_that_runs_out_later_makes_an_automatic_micro_batch_smaller(
    plain: list[float], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    room = 8

    def run_out(module: nn.Module, arguments: Any, inputs: Any) -> None:
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError(
                "Tried to allocate 2 GiB. 1 GiB is free. If reserved memory is large"
            )

    losses = []
    with open_run() as run:
        trainer = _trainer(run, micro_batch="auto")
        trainer.model.register_forward_pre_hook(run_out, with_kwargs=True)
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=4):
            room = 8 if run.step < 3 else 3
            losses.append(trainer.step(batch).item())
        assert trainer._cut.size == 2
    assert losses == pytest.approx(plain, rel=1e-6)
    with open_run("again") as run:
        again = _trainer(run, micro_batch="auto")
        assert _losses(again) == pytest.approx(plain, rel=1e-6)
        assert again._cut.size == 2, "it is remembered"


@pytest.fixture
def eagerly() -> Iterator[None]:
    """What an optimizer would have compiled, as that of 8 bits does for each shape, is called as it is."""
    with torch.compiler.set_stance("default" if SOAK else "force_eager"):
        yield


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 8), ("muon", 4), ("sgd", 4), ("adamw8bit", 2.1), ("adafactor", 0.031)]
)
@pytest.mark.filterwarnings("ignore")
def test_memory_that_an_optimizer_is_going_to_take_is_known(
    name: Any, expected: float, eagerly: None
) -> None:
    weights = torch.nn.Parameter(torch.ones(128, 128))
    optimizer = optimizers.factory(name, lr=0.1)([weights])
    held = sum(t.nbytes for t in rehearsal.state_to_come(optimizer)) / weights.numel()
    assert held == pytest.approx(expected, rel=0.1)
    weights.grad = torch.ones_like(weights)
    before = weights.detach().clone()
    assert not optimizer.state
    optimizer.step()
    assert not torch.equal(weights, before)
    assert rehearsal.state_to_come(optimizer) == []


@pytest.mark.parametrize("micro", [None, "auto", 4, 2])
def test_a_batch_with_time_first_is_cut_at_no_time(micro: Any, open_run: Callable[..., Run]) -> None:
    seen = []

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
        seen.append([tuple(part.shape) for part in batch])
        return output.sum(), batch[0].shape[1]

    def time_first(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack(samples, dim=1), torch.stack(samples, dim=1)

    with open_run() as run:
        trainer = Trainer(
            run, nn.Linear(4, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=loss,
            training=Training(precision="fp32", micro_batch=micro),
        )  # fmt: skip
        loader = trainer.loader(list(torch.ones(8, 6, 4)), batch_size=4, collate=time_first)
        for batch in trainer.steps(loader, max_steps=2):
            if micro == 2:
                with pytest.raises(BadInput, match=r"micro_batch=2: .* of shape \(6, 4, 4\), \(6, 4, 4\)"):
                    trainer.step(batch)
                return
            trainer.step(batch)
    assert seen == [[(6, 4, 4), (6, 4, 4)]] * 2


SIZES = (1, 2, 3, 4, 6, 12)


def test_the_largest_micro_batch_that_fits_is_taken(tmp_path: Path) -> None:
    def fits_up_to(limit: int) -> Callable[[int], None]:
        def attempt(size: int) -> None:
            if size > limit:
                raise torch.OutOfMemoryError("none left")

        return attempt

    cpu = torch.device("cpu")
    for limit, expected in ((5, 4), (12, 12), (1, 1)):
        memory = tmp_path / f"{limit}.json"
        found = micro_batch.find(SIZES, fits_up_to(limit), cpu, memory=memory, about={})
        assert found == expected
    with pytest.raises(Exception, match="not even one sample fits"):
        micro_batch.find(SIZES, fits_up_to(0), cpu, memory=tmp_path / "0.json", about={})


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_training_ends_early_once_nothing_gets_better(floor: float, open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        trainer = _trainer(run)
        for _ in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=50):
            run.log(val_loss=floor + max(0.0, 5.0 - run.step))  # no better from step 5 on
            if trainer.stale("val_loss", patience=3):
                trainer.finish("no better")
        assert trainer.steps_done == 8
    with open_run("b") as run, pytest.raises(ValueError, match="was not logged"):
        _trainer(run).stale("val_loss", 3)


def test_what_ended_early_has_ended_for_whoever_continues_it(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    """As a kill while the model is exported does; another length is a wish to go on."""

    def steps_of(length: int) -> int:
        with open_run() as run:
            trainer = _trainer(run)
            for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=length):
                run.log(loss=trainer.step(batch))
                if run.step == 3:
                    trainer.finish("no better")
            return trainer.steps_done

    with caplog.at_level("INFO", logger="stoker"):
        assert [steps_of(6) for _ in range(3)] == [3, 3, 3]
    assert caplog.text.count("the run was finished early, after step 3; give another length to go on") == 2
    assert [steps_of(8), steps_of(8)] == [8, 8]


def test_auto_takes_the_simplest_strategy_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    model = llama()
    chosen, why = strategies.choose(model, Training(), World(), cpu)
    assert (chosen, why) == ("single", "there is only one process")
    assert strategies.choose(model, Training(), World(0, 4), cpu)[0] == "ddp"
    monkeypatch.setattr(memory, "of_a_rank", lambda device, ranks: 2**20)
    chosen, why = strategies.choose(model, Training(), World(0, 4), cpu)
    assert chosen == "fsdp"
    assert "of a rank's 1.0 MiB" in why
    assert strategies.choose(model, Training(parallel="ddp"), World(0, 4), cpu)[0] == "ddp"


def test_wsd_is_stable_and_then_goes_down() -> None:
    factor = schedule.build("wsd", warmup=0.1, decay=0.2)
    assert [factor(step, 100) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert factor(90, 100) == pytest.approx(0.5)
    assert factor(99, 100) == pytest.approx(0.05)
    assert factor(4, 100) < 0.5


@pytest.mark.soak
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor", "adamw8bit"])
@pytest.mark.filterwarnings("ignore")
def test_weight_decay_shrinks_matrices_alone_unless_all_is_asked_for(name: Any, eagerly: None) -> None:
    for decay_all in (False, True):
        matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((128, 128), (128,)))
        make = optimizers.factory(name, lr=0.1, weight_decay=0.5, decay_all=decay_all)
        for parameters in ([matrix, vector], [torch.nn.Parameter(torch.ones(128, 128))]):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            make(parameters).step()
        assert float(matrix.detach().max()) < 1
        assert (float(vector.detach().max()) < 1) == decay_all


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor", "adamw8bit"])
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_brings_the_loss_down_and_resumes(name: Any, open_run: Callable[..., Run]) -> None:
    # Of few shapes, as that of 8 bits is compiled for each.
    square = {"intermediate_size": 32, "num_key_value_heads": 4}

    def train(run: Run, steps: int) -> list[float]:
        trainer = Trainer(
            run,
            llama(layers=2, **square),
            optimizer=optimizers.factory(name, lr=0.1 if name == "sgd" else 1e-2, weight_decay=0.1),
            inputs=inputs,
            loss=token_loss,
            training=Training(precision="fp32"),
        )  # fmt: skip
        return _losses(trainer, steps)

    with open_run("whole") as run:
        whole = train(run, 12)
    assert whole[-1] < whole[0]
    with open_run("cut") as run:
        train(run, 5)
    with open_run("cut") as run:
        assert train(run, 12) == whole[5:]


def test_batch_norm_and_micro_batches_are_warned_of(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    def loader(batch_size: int = 32, **settings: Any) -> None:
        with open_run(str(len(caplog.records))) as run:
            trainer = Trainer(
                run, resnet(), optimizer=torch.optim.AdamW, inputs=lambda b: (b[0],), loss=image_loss,
                training=Training(precision="fp32", **settings),
            )  # fmt: skip
            trainer.loader(Images(), batch_size=batch_size)

    loader()
    loader(batch_size=8)
    assert "BatchNorm" not in caplog.text
    loader(micro_batch=16)
    assert "BatchNorm computes its statistics on micro-batches of 16 samples" in caplog.text


def test_channels_last_changes_no_loss(open_run: Callable[..., Run]) -> None:
    found = []
    for channels_last in (False, True):
        with open_run(f"{channels_last}") as run:
            trainer = Trainer(
                run, resnet(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), inputs=lambda b: (b[0],),
                loss=image_loss, training=Training(precision="fp32", channels_last=channels_last),
            )  # fmt: skip
            loader = trainer.loader(Images(), batch_size=16)
            batches = trainer.steps(loader, max_steps=3)
            found.append([trainer.step(batch).item() for batch in batches])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("share", "ranks", "expected"), [(64, 2, 8), (64, 4, 4), (8, 2, 1), (6, 2, 1), (4, 4, 1), (3, 2, 1)]
)
def test_a_pipeline_has_several_micro_batches_a_rank(share: int, ranks: int, expected: int) -> None:
    sizes = options.pipeline_micro_batches("1f1b", share, ranks)
    assert micro_batch.of_pipeline(sizes, share, ranks) == expected


def test_micro_batches_of_a_pipeline_suit_its_schedule() -> None:
    assert options.pipeline_micro_batches("gpipe", 8, 2) == [1, 2, 4, 8]
    assert options.pipeline_micro_batches("1f1b", 8, 2) == [1, 2, 4]
    assert options.pipeline_micro_batches("1f1b", 3, 4) == []
    assert options.pipeline_micro_batches("interleaved", 10, 2) == [1, 5, 10]

    def check(schedule: Any, batch_size: int, micro: int | None) -> None:
        pipeline = Pipeline(schedule=schedule, ranks=2)
        training = Training(parallel="pipeline", pipeline=pipeline, micro_batch=micro)
        options.check(training, ranks=4, gpus=0, batch_size=batch_size)

    check("1f1b", 16, 4)
    with pytest.raises(BadInput, match=r"micro_batch=8 does not split the 8 samples.* use one of 1, 2, 4$"):
        check("1f1b", 16, 8)
    with pytest.raises(BadInput, match="micro_batch=3 does not split"):
        check("gpipe", 16, 3)
    with pytest.raises(BadInput, match=r"a batch of 1 sample is too small for a pipeline of 2 ranks"):
        check("1f1b", 2, None)


def test_what_needs_an_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'stoker\[deepspeed\]'"):
        options.check(deepspeed_file.completed(Training(parallel="deepspeed")), ranks=2, gpus=0)
    with pytest.raises(BadInput, match=r"pip install 'stoker\[quantisation\]'"):
        optimizers.factory("adamw8bit", lr=1e-3)


# -- an existing DeepSpeed file -------------------------------------------------------------


def _file(tmp_path: Path, **content: Any) -> DeepSpeed:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    return DeepSpeed(config=tmp_path / "ds.json")


def test_a_deepspeed_file_is_taken_as_it_is(tmp_path: Path) -> None:
    chosen = _file(
        tmp_path, train_micro_batch_size_per_gpu=2, gradient_clipping=0.7, bf16={"enabled": True},
        zero_optimization={"stage": 1, "reduce_bucket_size": 1000}, train_batch_size="auto",
    )  # fmt: skip
    found = deepspeed_file.completed(Training(parallel="deepspeed", deepspeed=chosen))
    assert (found.micro_batch, found.clip_norm, found.precision) == (2, 0.7, "bf16")
    assert found.deepspeed.stage == 1


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ({"gradient_clipping": 0.5}, {"clip_norm": 1.0}, "set twice: clip_norm=1.0"),
        ({"gradient_clipping": 0.5}, {"clip_norm": 1.0}, "use clip_norm=0.5, or clip_norm=none to leave it"),
        ({"gradient_clipping": 0}, {"clip_norm": 1.0}, 'use clip_norm=none, or "auto" in the file'),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch": 2}, "set twice: micro_batch=2"),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, "set twice: precision=bf16"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, "bf16.enabled to false: use precision=fp32"),
        ({"bfloat16": {"enabled": True}}, {"precision": "fp32"}, "set twice: precision=fp32"),
        ({"torch_autocast": {"enabled": True}}, {"precision": "bf16"}, "enables torch_autocast"),
        ({"optimizer": {"type": "Adam"}}, {}, "sets the optimizer, and so does the run"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "sets the scheduler, and so does the run"),
    ],
)
def test_what_a_deepspeed_file_sets_twice_is_refused(
    content: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    training = Training(parallel="deepspeed", deepspeed=_file(tmp_path, **content), **settings)
    with pytest.raises(BadInput, match=said):
        deepspeed_file.completed(training)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": 3}, "zero_optimization is 3: must be an object"),
        (
            {"zero_optimization": {"stage": "abc"}},
            'zero_optimization.stage is "abc": must be 0, 1, 2 or 3',
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2: must be 0 or 1, since"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2: must be 1, since"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled is true: must be false, since"),
        ({"bf16": True}, "bf16 is true: must be an object"),
        ({"activation_checkpointing": 3}, "activation_checkpointing is 3: must be an object"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes": must be true or false'),
        ({"train_micro_batch_size_per_gpu": "x"}, ": must be a whole number above 0"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: must be a number (0 for no clipping)"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "enables both bf16 and fp16"),
        ({"bf16": {}, "bfloat16": {}}, "has both bf16 and bfloat16"),
        ({"zero_optimisation": {}}, "does not know 'zero_optimisation'; did you mean 'zero_optimization'?"),
    ],
)
def test_a_mistake_in_a_deepspeed_file_is_named(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        deepspeed_file.completed(Training(parallel="deepspeed", deepspeed=_file(tmp_path, **content)))


@pytest.mark.parametrize(
    ("content", "precision"),
    [
        ({"bf16": "auto", "fp16": "auto", "zero_optimization": "auto"}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, "auto"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bfloat16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
    ],
)
def test_a_deepspeed_file_sets_the_precision_or_leaves_it(
    content: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    training = Training(parallel="deepspeed", deepspeed=_file(tmp_path, **content))
    assert deepspeed_file.completed(training).precision == precision


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3, but the stage is 2"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_param": {"device": "none"}}, ""),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, ""),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param is on nvme, where no checkpoint"),
    ],
)
def test_what_its_stage_or_no_checkpoint_reaches_is_refused_in_a_deepspeed_file_too(
    content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = Training(parallel="deepspeed", deepspeed=_file(tmp_path, zero_optimization=content))
    training = deepspeed_file.completed(given)
    with pytest.raises(BadInput, match=said) if said else contextlib.nullcontext():
        options.check(training, ranks=2, gpus=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"zero_optimization": {"ofload_optimizer": {}}},
            r"ds.json: zero_optimization.ofload_optimizer: Extra inputs are not permitted",
        ),
        ({"zero_optimization": {"mics_shard_size": 2}}, r"ds.json: DeepSpeed refuses it: MiCS"),
        ({"bf16": {"bf16_optimizer_states": True}}, r"ds.json: DeepSpeed refuses it: bf16_optimizer_states"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"ds.json: DeepSpeed refuses it: .*Partial offloading",
        ),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            r"ds.json: data_types.grad_accum_dtype needs stage 2 or 3, but the stage is 1",
        ),
        (
            {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
            r"ds.json: data_types.grad_accum_dtype needs stage 2 or 3, but the stage is 0: remove it",
        ),
    ],
)
def test_what_deepspeed_itself_refuses_is_bad_input(
    open_run: Callable[..., Run], content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    training = Training(parallel="deepspeed", precision="fp32", deepspeed=_file(tmp_path, **content))
    with open_run() as run, pytest.raises(BadInput, match=said):
        Trainer(run, torch.nn.Linear(2, 1), optimizer=torch.optim.SGD, training=training)


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed
def test_on_a_cpu_zero_keeps_a_frozen_weight_without_copying_it(open_run: Callable[..., Run]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
    frozen = model[0].weight.requires_grad_(False)
    values, place = frozen.detach().clone(), frozen.data_ptr()
    training = Training(parallel="deepspeed", precision="bf16", deepspeed=DeepSpeed(stage=2))
    with open_run() as run:
        trainer = Trainer(run, model, optimizer=torch.optim.SGD, training=training)
        kept = trainer._step.whole(frozen)
    assert torch.equal(kept, values)
    assert kept.data_ptr() == place


def test_a_deepspeed_file_may_switch_clipping_off(tmp_path: Path) -> None:
    found = deepspeed_file.completed(
        Training(parallel="deepspeed", deepspeed=_file(tmp_path, gradient_clipping=0.0))
    )
    assert found.clip_norm is None


def test_settings_of_another_strategy_are_noticed() -> None:
    training = Training(fsdp=Fsdp(shard=2), deepspeed=DeepSpeed(stage=3))
    assert options.unused(training, "ddp") == ["fsdp", "deepspeed"]
    assert options.unused(training, "fsdp") == ["deepspeed"]
    assert options.unused(training, "single") == []


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device.check(2)
    with pytest.raises(
        BadInput, match=r"3 ranks on a machine with 2 GPUs: each rank needs its own; use --nproc 2"
    ):
        device.check(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device.check(3)


def test_a_rank_that_sees_only_its_own_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    second = World(rank=1, size=2, local_rank=1, local_size=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(BadInput, match="2 ranks on a machine with 1 GPU"):
        device.pick(second)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert device.pick(second) == torch.device("cuda", 0)


def test_ranks_that_see_the_same_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    for others, refused in ((["b", "c"], False), (["b", "a"], True)):
        monkeypatch.setattr(distributed, "gathered", lambda own, others=others: [own, *others])
        with pytest.raises(BadInput, match="ranks 0, 2 share a GPU") if refused else contextlib.nullcontext():
            device.check_apart(torch.device("cuda", 0))
    device.check_apart(torch.device("cpu"))


def test_a_deepspeed_file_with_another_stage_or_batch_is_refused(tmp_path: Path) -> None:
    chosen = _file(tmp_path, zero_optimization={"stage": 3}, train_batch_size=64)
    with pytest.raises(BadInput, match=r"the ZeRO stage is set twice: deepspeed.stage=2, but 3"):
        deepspeed_file.completed(
            Training(parallel="deepspeed", deepspeed=dataclasses.replace(chosen, stage=2))
        )
    training = Training(parallel="deepspeed", deepspeed=chosen)
    with pytest.raises(BadInput, match="sets train_batch_size to 64, but the run uses 32"):
        deepspeed_file.check_batch(training, batch_size=32, ranks=2, parts=1)
