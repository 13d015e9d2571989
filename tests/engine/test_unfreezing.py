"""Weights that are not always trained, or not by one optimizer, are those of plain PyTorch on any ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import unfreezing_run
from stoker import Run, Trainer, Training
from torch import nn
from unfreezing_run import TURNS_AT, Weights

import ranks
from support import SOAK

EMA: dict[str, Any] = {"ema": {"decay": 0.5, "warmup": False}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, EMA),
    "ddp": (2, {"parallel": "ddp", **EMA}),
    "ddp-accumulating": (2, {"parallel": "ddp", "micro_batch": 2, **EMA}),
    "ddp-static": (
        2,
        {
            "parallel": "ddp", "micro_batch": 1, **EMA,
            "ddp": {"static_graph": True, "gradient_as_bucket_view": False},
        },
    ),
    "fsdp": (2, {"parallel": "fsdp", **EMA}),
}  # fmt: skip


PIPELINE = {"parallel": "pipeline", "micro_batch": 2, "pipeline": {"ranks": 2}}


def _assert_same(found: tuple[Weights, Weights], expected: tuple[Weights, Weights]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


WAYS = ("one loop", "two loops", "in turn")
SOME = [
    ("single", "one loop"), ("ddp-accumulating", "one loop"), ("ddp-accumulating", "two loops"),
    ("ddp-static", "in turn"), ("fsdp", "two loops"),
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize(("layout", "way"), list(itertools.product(LAYOUTS, WAYS)) if SOAK else SOME)
def test_what_is_unfrozen_on_the_way_is_trained_as_in_plain_torch(
    layout: str, way: str, tmp_path: Path
) -> None:
    size, settings = LAYOUTS[layout]
    found = ranks.run(unfreezing_run.train, size, tmp_path, tmp_path, "a", way, settings)[0]
    _assert_same(found, unfreezing_run.plain(way, 0.5))


@pytest.mark.soak(small=False)
def test_what_is_unfrozen_in_every_stage_of_a_pipeline_is_trained_on_all_ranks(tmp_path: Path) -> None:
    found = ranks.run(unfreezing_run.train, 4, tmp_path, tmp_path, "a", "biases", {**PIPELINE, **EMA})[0]
    _assert_same(found, unfreezing_run.plain("biases", 0.5))


def test_ranks_that_freeze_different_weights_are_refused(tmp_path: Path) -> None:
    said = ranks.run(unfreezing_run.freeze_apart, 2, tmp_path, tmp_path)
    assert all("some ranks train 0.bias, 2.bias, and others have frozen it" in one for one in said)


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 4] if SOAK else [4])
def test_what_is_unfrozen_in_one_stage_of_a_pipeline_is_trained(size: int, tmp_path: Path) -> None:
    found = ranks.run(unfreezing_run.train, size, tmp_path, tmp_path, "a", "a bias", {**PIPELINE, **EMA})
    _assert_same(found[0], unfreezing_run.plain("a bias", 0.5))


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS if SOAK else WAYS[:1])
def test_what_is_unfrozen_on_the_way_goes_on_after_a_kill(way: str, tmp_path: Path) -> None:
    """Before that, right after it, and later."""
    size, settings = LAYOUTS["ddp-accumulating"]
    for dies_at in (TURNS_AT, TURNS_AT + 2, TURNS_AT + 4):
        ranks.run(unfreezing_run.train, size, tmp_path, tmp_path, "a", way, settings, die_at=dies_at)
    found = ranks.run(unfreezing_run.train, size, tmp_path, tmp_path, "a", way, settings)[0]
    _assert_same(found, unfreezing_run.plain(way, 0.5))


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["ddp-accumulating", "fsdp", *(["single", "ddp"] if SOAK else [])])
def test_optimizers_that_share_a_loss_step_together_as_in_plain_torch(layout: str, tmp_path: Path) -> None:
    size, settings = LAYOUTS[layout]
    found = ranks.run(unfreezing_run.train_together, size, tmp_path, tmp_path, settings, 0.1)[0]
    _assert_same(found, unfreezing_run.plain_together(0.1, 0.5))


def test_what_has_no_part_in_the_loss_is_named_also_if_others_are_frozen(tmp_path: Path) -> None:
    for said in ranks.run(unfreezing_run.leaves_out, 2, tmp_path, tmp_path):
        assert "parameters (of.spare.weight, of.spare.bias) did not contribute to the loss" in said


def _coder(run: Run, **settings: Any) -> Trainer:
    model = unfreezing_run.Coder()
    training = Training(**{"precision": "fp32", **settings})
    return Trainer(run, model, optimizer=model.optimizers(), training=training)


def _batches(trainer: Trainer, steps: int) -> Any:
    return trainer.steps(trainer.loader(unfreezing_run.dataset(), batch_size=8), max_steps=steps)


def test_an_optimizer_whose_gradients_another_update_has_cleared_is_refused(tmp_path: Path) -> None:
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _coder(run)
        for batch in _batches(trainer, 1):
            trainer.backward(*unfreezing_run.loss(trainer.forward(batch), batch))
            trainer.update(trainer.optimizers["encoder"])
            with pytest.raises(ValueError, match=r"trainer\.update\(a, b\)"):
                trainer.update(trainer.optimizers["decoder"])


def test_an_overflow_halves_the_scale_once_for_optimizers_that_step_together(tmp_path: Path) -> None:
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _coder(run, precision="fp16")
        for batch in _batches(trainer, 2):
            before = [p.detach().clone() for p in trainer.model.parameters()]
            loss, weight = unfreezing_run.loss(trainer.forward(batch).float(), batch)
            trainer.backward(loss * (1e37 if run.step == 2 else 1.0), weight)
            scale = trainer._scale.value
            trainer.update(*trainer.optimizers.values())
            same = [torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True)]
            assert same == [run.step == 2] * 4
            assert trainer._scale.value == (scale / 2 if run.step == 2 else scale)


def _thawing(run: Run, steps: int, *, gives: bool, teacher: bool = False) -> nn.Module:
    """A decoder is unfrozen in the third step, and given to the optimizer or not."""
    model = unfreezing_run.Coder()
    model.decoder.requires_grad_(False)
    if teacher:
        model.teacher = nn.Linear(6, 8)
    trainer = Trainer(
        run, model, optimizer=lambda p: torch.optim.SGD(model.encoder.parameters(), lr=0.1, momentum=0.9),
        loss=unfreezing_run.loss, training=Training(precision="fp32"),
    )  # fmt: skip
    for batch in _batches(trainer, steps):
        if run.step == 3:
            thawed = list(model.decoder.requires_grad_(True).parameters())
            if gives:
                trainer.optimizer.add_param_group({"params": thawed, "lr": 0.01})
        run.log(loss=trainer.step(batch))
    return model


def test_what_gets_gradients_but_has_no_optimizer_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is unfrozen; what the loss does not depend on, such as a teacher, is not."""
    with Run("test", "a", runs=tmp_path) as run:
        _thawing(run, 2, gives=False, teacher=True)
    assert "no optimizer of the Trainer has" not in caplog.text
    with Run("test", "b", runs=tmp_path) as run:
        _thawing(run, 6, gives=False, teacher=True)
    (said,) = [r.getMessage() for r in caplog.records if "no optimizer of the Trainer has" in r.getMessage()]
    assert "Trainer has decoder.weight, decoder.bias, which get gradients" in said


def test_what_is_given_to_the_optimizer_where_it_is_unfrozen_goes_on_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for name, lengths in {"whole": [6], "cut": [4, 6]}.items():
        for steps in lengths:
            with Run("test", name, runs=tmp_path) as run:
                model = _thawing(run, steps, gives=True)
        found.append(model.state_dict())
    assert "no optimizer of the Trainer has" not in caplog.text
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not torch.equal(found[0]["decoder.weight"], unfreezing_run.Coder().decoder.weight)


def test_what_an_optimizer_of_the_script_has_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = unfreezing_run.Coder()
    with Run("test", "a", runs=tmp_path) as run:
        trainer = Trainer(
            run, model, optimizer={"encoder": lambda p: torch.optim.SGD(p, lr=0.1)},
            loss=unfreezing_run.loss, training=Training(precision="fp32"),
        )  # fmt: skip
        own = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
        trainer.register_for_checkpointing(own=own)
        for batch in _batches(trainer, 2):
            trainer.backward(*unfreezing_run.loss(trainer.forward(batch), batch))
            own.step()
            trainer.update()
    assert "no optimizer of the Trainer has" not in caplog.text
