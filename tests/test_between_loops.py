"""Scripts that do something between their Trainer and its loop, or between two loops, at every start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stoker import Run, Trainer, Training
from stoker.duration import Duration
from stoker.engine.random_state import seed_everything
from stoker.run import view
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Subset, TensorDataset

from support import SOAK

Change = Callable[[Trainer], None]


class _Killed(Exception):
    pass


def _dataset() -> TensorDataset:
    made = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 6, generator=made), torch.randint(0, 3, (40,), generator=made))


def _trainer(run: Run, **settings: Any) -> Trainer:
    seed_everything(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return Trainer(
        run, model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        loss=lambda output, batch: (cross_entropy(output, batch[1], reduction="sum"), len(batch[1])),
        training=Training(precision="fp32", checkpoint_every=Duration(2, "step"), **settings),
    )  # fmt: skip


def _reset(trainer: Trainer) -> None:
    nn.init.zeros_(trainer.model[2].weight)


def _shake(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model[2].weight.add_(torch.randn_like(trainer.model[2].weight))


def _slow_down(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] *= 0.1


def _thaw(trainer: Trainer) -> None:
    thawed = list(trainer.model[0].requires_grad_(True).parameters())
    trainer.optimizer.add_param_group({"params": thawed, "lr": 0.01})


def _thaw_in_place(trainer: Trainer) -> None:
    trainer.optimizer.param_groups[0]["params"] += list(trainer.model[0].requires_grad_(True).parameters())


def _in_two_stages(run: Run, change: Change, dies_at: int = 0) -> dict[str, torch.Tensor]:
    trainer = _trainer(run)
    loader = trainer.loader(_dataset(), batch_size=8)
    for steps in (6, 14):
        for batch in trainer.steps(loader, max_steps=steps):
            run.log(loss=trainer.step(batch), lr=trainer.lr)
            if run.step == dies_at:
                raise _Killed
        run.log(val_loss=trainer.evaluate(_dataset(), batch_size=8))
        run.text("said", f"after {run.step}")
        if steps == 6:
            change(trainer)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _in_epochs(run: Run, dies_at: int = 0) -> dict[str, torch.Tensor]:
    trainer = _trainer(run)
    scheduler = StepLR(trainer.optimizer, 1, gamma=0.5)
    trainer.register_for_checkpointing(scheduler=scheduler)
    loader = trainer.loader(_dataset(), batch_size=8)
    for epoch in range(3):
        for batch in trainer.steps(loader, epochs=epoch + 1):
            run.log(loss=trainer.step(batch), lr=trainer.lr)
            if run.step == dies_at:
                raise _Killed
        run.log(val_loss=trainer.evaluate(_dataset(), batch_size=8))
        scheduler.step()
    assert scheduler.last_epoch == 3
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


class _Numbers(TensorDataset):
    """Samples that say which they are."""

    def __init__(self, count: int, seen: list[int]) -> None:
        super().__init__(torch.arange(count))
        self._seen = seen

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        self._seen.append(index)
        made = torch.Generator().manual_seed(index)
        return torch.randn(6, generator=made), torch.tensor(index % 3)


def _with_other_data(
    run: Run, dies_at: int = 0, seen: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Two epochs of 16 samples, then one and a half of 40 others, then 3 steps more of the first."""
    trainer = _trainer(run)
    for stage, (count, length) in enumerate(
        ((16, {"epochs": 2}), (40, {"epochs": 1.5}), (16, {"max_steps": 3}))
    ):
        of_stage: list[int] = []
        loader = trainer.loader(_Numbers(count, of_stage), batch_size=8)
        for batch in trainer.steps(loader, from_here=stage > 0, **length):  # type: ignore[arg-type]
            run.log(loss=trainer.step(batch), lr=trainer.lr, epoch=trainer.step_metrics()["epoch"])
            if trainer.every("1ep"):
                run.log(whole_epochs=stage)
            if run.step == dies_at:
                raise _Killed
        if seen is not None:
            seen.append(of_stage)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _assert_goes_on(
    runs: Path, train: Callable[[Run, int], dict[str, torch.Tensor]], dies_at: tuple[int, ...]
) -> None:
    """A run that dies and goes on has the weights, the curves and the media of one that does not."""
    with Run("test", "whole", runs=runs) as run:
        whole = train(run, 0)
    for step in dies_at:
        with pytest.raises(_Killed), Run("test", "cut", runs=runs) as run:
            train(run, step)
    with Run("test", "cut", runs=runs) as run:
        torch.testing.assert_close(train(run, 0), whole, rtol=0, atol=0)
    seen = [view.load(Run("test", name, runs=runs).directory) for name in ("whole", "cut")]
    curves = [{m: dict(s.items()) for m, s in one.points.items() if "/" not in m} for one in seen]
    assert curves[0] == curves[1]
    media = [[(medium.name, medium.step) for medium in one.media] for one in seen]
    assert media[0] == media[1]


@pytest.mark.soak
@pytest.mark.parametrize("dies_at", [(7, 11), *([(5,), (7,), (9,), (9, 13)] if SOAK else [])])
@pytest.mark.parametrize("change", [_reset, _shake, _slow_down, _thaw, _thaw_in_place])
def test_what_is_changed_between_two_loops_is_changed_once(
    change: Change, dies_at: tuple[int, ...], tmp_path: Path
) -> None:
    _assert_goes_on(tmp_path, lambda run, dies: _in_two_stages(run, change, dies), dies_at)


@pytest.mark.soak
@pytest.mark.parametrize("dies_at", [(7,), (14,), (9, 14)] if SOAK else [(9, 14)])
def test_a_scheduler_that_steps_between_loops_steps_once(dies_at: tuple[int, ...], tmp_path: Path) -> None:
    _assert_goes_on(tmp_path, _in_epochs, dies_at)


def test_weights_that_are_set_before_the_loop_are_those_of_the_checkpoint_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(run: Run, dies_at: int) -> dict[str, torch.Tensor]:
        trainer = _trainer(run)
        nn.init.constant_(trainer.model[2].weight, 0.01)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=10):
            run.log(loss=trainer.step(batch))
            if run.step == dies_at:
                raise _Killed
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    _assert_goes_on(tmp_path, train, (7,))
    assert caplog.text.count("the Trainer had restored was changed before the loop (2.weight)") == 1


class _Counter:
    def __init__(self) -> None:
        self.level = 0

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "none": float("nan")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


def test_rates_and_registered_objects_that_are_set_before_a_loop_are_set_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(run: Run, dies_at: int) -> dict[str, torch.Tensor]:
        trainer, counter = _trainer(run), _Counter()
        scheduler = StepLR(trainer.optimizer, 3, gamma=0.5)
        trainer.register_for_checkpointing(counter=counter, scheduler=scheduler)
        loader = trainer.loader(_dataset(), batch_size=8)
        for steps in (4, 8, 12):
            counter.level += 1
            for group in trainer.optimizer.param_groups:
                group["lr"] *= 2
            for batch in trainer.steps(loader, max_steps=steps):
                run.log(loss=trainer.step(batch), lr=trainer.lr, level=counter.level)
                if run.step == dies_at:
                    raise _Killed
                scheduler.step()
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    _assert_goes_on(tmp_path, train, (3, 5, 7, 9))  # from steps 2, of the first loop, 4, its end, 6 and 8
    said = "the Trainer had restored was changed before the loop (counter, optimizer.lr)"
    assert caplog.text.count(said) == 2


@pytest.mark.parametrize(("by", "registers"), [("chance", False), ("loss", False), ("loss", True)])
def test_a_subset_that_is_picked_for_a_loop_is_picked_alike_or_warned_of(
    by: str, registers: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(run: Run, dies_at: int) -> list[int]:
        trainer, picked = _trainer(run), _Picked()
        if registers:
            trainer.register_for_checkpointing(picked=picked)
        for epoch in range(3):
            picked.pick(epoch, trainer.model if by == "loss" else None)
            loader = trainer.loader(Subset(_dataset(), picked.of[epoch]), batch_size=8)
            for batch in trainer.steps(loader, epochs=epoch + 1):
                trainer.step(batch)
                if run.step == dies_at:
                    raise _Killed
        return picked.of[2]

    with Run("test", "whole", runs=tmp_path) as run:
        whole = train(run, 0)
    for step in (8, 9):
        with pytest.raises(_Killed), Run("test", "cut", runs=tmp_path) as run:
            train(run, step)  # of the third loop, from step 6, where it began, or 8
    with Run("test", "cut", runs=tmp_path) as run:
        assert (train(run, 0) == whole) == (by == "chance" or registers)
    said = "the loop reads another subset than before the run was stopped"
    assert (said in caplog.text) == (by == "loss" and not registers)


class _Picked:
    """Indices for each epoch, drawn where there are none yet."""

    def __init__(self) -> None:
        self.of: dict[int, list[int]] = {}

    def pick(self, epoch: int, model: nn.Module | None) -> None:
        if epoch in self.of:
            return
        inputs, classes = _dataset().tensors
        hardest = torch.randperm(40) if model is None else cross_entropy(
            model(inputs), classes, reduction="none"
        ).argsort()  # fmt: skip
        self.of[epoch] = hardest[:24].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"of": {str(epoch): picked for epoch, picked in self.of.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.of = {int(epoch): picked for epoch, picked in state["of"].items()}


def test_an_optimizer_may_be_given_parameters_before_the_loop_at_every_start(tmp_path: Path) -> None:
    def train(run: Run, dies_at: int) -> dict[str, torch.Tensor]:
        trainer = _trainer(run)
        _thaw(trainer)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=10):
            run.log(loss=trainer.step(batch))
            if run.step == dies_at:
                raise _Killed
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    _assert_goes_on(tmp_path, train, (3, 7))


def test_what_is_logged_behind_a_loop_that_is_over_is_kept_if_no_other_follows(tmp_path: Path) -> None:
    """A run that is resumed with a smaller length, to be measured now."""
    for steps in (8, 4):
        with Run("test", "a", runs=tmp_path) as run:
            trainer = _trainer(run)
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                trainer.step(batch)
            if steps == 4:
                run.log(test_loss=trainer.evaluate(_dataset(), batch_size=8))
    assert list(dict(view.load(run.directory).points["test_loss"].items())) == [8]


@pytest.mark.parametrize("change", [_slow_down, _thaw])
def test_what_is_between_loops_is_done_once_the_first_is_over_earlier(change: Change, tmp_path: Path) -> None:
    """A run that died in its first stage, which is made shorter to go on with the second."""
    with pytest.raises(_Killed), Run("test", "a", runs=tmp_path) as run:
        _in_two_stages(run, change, 5)
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _trainer(run)
        for steps in (2, 8):
            for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                run.log(lr=trainer.optimizer.param_groups[-1]["lr"])
                trainer.step(batch)
            if steps == 2:
                run.log(val_loss=1.0)
                change(trainer)
    seen = view.load(run.directory)
    assert seen.points["lr"][8] == pytest.approx(0.01)
    assert "val_loss" in seen.points


@pytest.mark.parametrize("ends", [SystemExit(0), RuntimeError("no export")])
def test_what_is_held_back_is_logged_however_the_script_ends(ends: BaseException, tmp_path: Path) -> None:
    with Run("test", "a", runs=tmp_path) as run:
        _in_two_stages(run, _slow_down)

    def without_second_stage(run: Run) -> None:
        trainer = _trainer(run)
        for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=6):
            trainer.step(batch)
        run.log(test_loss=0.5)
        raise ends

    with pytest.raises(type(ends)), Run("test", "a", runs=tmp_path) as run:
        without_second_stage(run)
    assert view.load(run.directory).last("test_loss") == 0.5


def test_a_curve_of_its_own_steps_between_loops_stays_whole(tmp_path: Path) -> None:
    for dies_at in (7, 0):
        with contextlib.suppress(_Killed), Run("test", "a", runs=tmp_path) as run:
            trainer = _trainer(run)
            for steps in (4, 8):
                for batch in trainer.steps(trainer.loader(_dataset(), batch_size=8), max_steps=steps):
                    trainer.step(batch)
                    if run.step == dies_at:
                        raise _Killed
                for point in range(20) if steps == 4 else ():
                    run.log(calibration=float(point), step=point)
    assert len(view.load(run.directory).points["calibration"]) == 20


def test_early_stopping_looks_at_each_value_once(tmp_path: Path) -> None:
    for dies_at in (14, 0):
        with contextlib.suppress(_Killed), Run("test", "a", runs=tmp_path) as run:
            trainer = _trainer(run)
            loader = trainer.loader(_dataset(), batch_size=8)
            for stage in range(1, 6):
                for batch in trainer.steps(loader, max_steps=4 * stage):
                    trainer.step(batch)
                    if run.step == dies_at:
                        raise _Killed
                run.log(val_loss=1 / stage)
                if trainer.stale("val_loss", 2):
                    break
    assert run.step == 20


@pytest.mark.soak
def test_a_loop_over_other_data_counts_from_where_it_begins_if_it_is_told_so(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    with Run("test", "a", runs=tmp_path / "runs") as run:
        _with_other_data(run, seen=seen)
    assert [len(of_stage) for of_stage in seen] == [32, 64, 24]
    assert all(
        sorted(of_stage[:count]) == list(range(count))
        for of_stage, count in zip(seen, (16, 40, 16), strict=True)
    )
    told = view.load(run.directory).points["whole_epochs"]
    assert list(zip(told.x, told.y, strict=True)) == [(2, 0), (4, 0), (9, 1), (14, 2)]
    _assert_goes_on(tmp_path / "more", _with_other_data, (3, 4, 5, 8, 12, 14) if SOAK else (3, 4, 12))


def test_each_loop_that_counts_from_where_it_begins_has_an_order_of_its_own(tmp_path: Path) -> None:
    seen: list[int] = []
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _trainer(run)
        loader = trainer.loader(_Numbers(16, seen), batch_size=8)
        for _ in range(3):
            for batch in trainer.steps(loader, epochs=1, from_here=True):
                trainer.step(batch)
    epochs = [seen[at : at + 16] for at in (0, 16, 32)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_loop_that_counts_from_where_it_begins_needs_no_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _trainer(run)
        for _ in trainer.steps(trainer.loader(_Numbers(16, []), batch_size=8), max_steps=2):
            break  # before a step is done
        for batch in trainer.steps(
            trainer.loader(_Numbers(40, []), batch_size=8), max_steps=1, from_here=True
        ):
            trainer.step(batch)
    assert "reads other data" not in caplog.text


def test_a_loop_that_begins_in_the_middle_of_other_data_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Run("test", "a", runs=tmp_path) as run:
        trainer = _trainer(run)
        for count, steps in ((16, 2), (40, 4)):
            loader = trainer.loader(_Numbers(count, []), batch_size=8)
            for batch in trainer.steps(loader, max_steps=steps):
                trainer.step(batch)
        assert "(40 samples, not 16), but begins at position 16 of it" in caplog.text
        with pytest.raises(ValueError, match="for a stage of its own, give from_here=True"):
            next(trainer.steps(loader, epochs=0.5))
