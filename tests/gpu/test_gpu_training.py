"""Training on a GPU: the CPU's curve, no waiting for the device, memory that really runs out."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stoker import Run, Trainer, Training
from stoker.engine import micro_batch
from stoker.engine.settings import DeepSpeed, Fsdp
from stoker.errors import OutOfMemory
from stoker.run.deferred import Deferred
from torch import nn
from torch.utils.data import Dataset

import support
from engine.strategies_run import Images, Rows, image_loss, inputs, llama, resnet, token_loss

pytestmark = support.ON_A_GPU

OpenRun = Callable[..., Run]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a test asks of torch ends with it."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture
def open_run(tmp_path: Path) -> OpenRun:
    return lambda name="a": Run("test", name, runs=tmp_path / "runs")


def trainer_of(run: Run, model: nn.Module | None = None, inputs: Any = inputs, **settings: Any) -> Trainer:
    return Trainer(
        run, llama() if model is None else model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        inputs=inputs, loss=token_loss, training=Training(**{"precision": "fp32", **settings}),
    )  # fmt: skip


def losses_of(trainer: Trainer, steps: int = 10) -> list[float]:
    loader = trainer.loader(Rows(), batch_size=8)
    return [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=steps)]


@pytest.fixture
def on_the_cpu(open_run: OpenRun) -> list[float]:
    """The losses of the same steps without a GPU, by plain PyTorch."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with open_run("order") as run:
        trainer = trainer_of(run)
        order = []
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=10):
            trainer.step(batch)
            order.append({name: value.cpu() for name, value in batch.items()})
    losses = []
    for batch in order:
        total, count = token_loss(model(**inputs(batch)), batch)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-5),
        ({"micro_batch": 2}, 1e-5),
        ({"deterministic": True}, 1e-5),
        ({"compile": True}, 1e-5),
        ({"activation_checkpointing": "selective"}, 1e-5),
        ({"parallel": "ddp"}, 1e-5),
        ({"parallel": "fsdp"}, 1e-5),
        ({"parallel": "fsdp", "fsdp": Fsdp(offload=True)}, 1e-5),
        ({"optimizer_in_backward": True}, 1e-5),
        ({"tf32": True}, 1e-3),
        ({"precision": "bf16"}, 1e-2),
        ({"precision": "fp16"}, 1e-3),
        ({"precision": "bf16", "parallel": "fsdp"}, 1e-2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_the_curve_is_that_of_the_cpu(
    settings: dict[str, Any], tolerance: float, on_the_cpu: list[float], open_run: OpenRun
) -> None:
    with open_run() as run:
        trainer = trainer_of(run, **settings)
        assert trainer.device.type == "cuda"
        assert losses_of(trainer) == pytest.approx(on_the_cpu, rel=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    "settings", [*({"stage": n} for n in range(4)), {"stage": 2, "offload_optimizer": True}], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_the_curve_under_zero_is_that_of_the_cpu(
    settings: dict[str, Any], on_the_cpu: list[float], open_run: OpenRun
) -> None:
    with open_run() as run:
        trainer = trainer_of(run, parallel="deepspeed", deepspeed=DeepSpeed(**settings))
        assert losses_of(trainer) == pytest.approx(on_the_cpu, rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"channels_last": True}, {"parallel": "ddp", "sync_batchnorm": True}]
)
@pytest.mark.filterwarnings("ignore")
def test_images_are_learnt(settings: dict[str, Any], open_run: OpenRun) -> None:
    with open_run() as run:
        trainer = Trainer(
            run, resnet(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), loss=image_loss,
            inputs=lambda batch: {"pixel_values": batch[0]}, training=Training(precision="bf16", **settings),
        )  # fmt: skip
        loader = trainer.loader(Images(), batch_size=16)
        losses = [trainer.step(batch).item() for batch in trainer.steps(loader, max_steps=30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.5, "micro_batch": 4}, {"precision": "bf16"}], ids=str
)
def test_a_step_and_its_logging_never_wait_for_the_device(
    settings: dict[str, Any], open_run: OpenRun
) -> None:
    with open_run() as run:
        # transformers looks at positions, where it is given some: that would wait
        trainer = trainer_of(run, inputs=lambda batch: {"input_ids": batch["input_ids"]}, **settings)
        kept = []
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=8):
            with support.never_waiting() if run.step > 2 else contextlib.nullcontext():
                loss = trainer.step(batch)
                run.log(loss=loss)
            kept.append((run.step, loss))
        expected = {step: loss.item() for step, loss in kept}
    assert dict(support.loaded(run.directory.path).points["loss"].items()) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_that_is_resumed_has_the_same_bits(
    precision: str, tmp_path: Path, open_run: OpenRun
) -> None:
    """Dropout on the GPU among them: its random state is kept."""

    def weights(name: str, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        for stop in stops:
            with open_run(name) as run:
                trainer = trainer_of(
                    run, llama(dropout=0.2), deterministic=True, precision=precision, clip_norm=0.5,
                    checkpoint_every="10h",
                )  # fmt: skip
                for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=stop):
                    run.log(loss=trainer.step(batch))
                found = {name: w.clone() for name, w in trainer.model.state_dict().items()}
        return found

    whole, parts = weights("whole", (12,)), weights("parts", (5, 9, 12))
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


class Long(Dataset[Any]):
    """Rows that take memory."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 64, (2048,), generator=made)
        return {"input_ids": ids, "position_ids": torch.arange(2048), "labels": ids}


def of_memory(gib: float) -> None:
    """Let this process have so much of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gib * 2**30) / total)


def test_the_micro_batch_that_fits_is_found_by_running_out(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(micro_batch, "_foreseen", lambda tried, size: 0.0)
    of_memory(0.5)
    with open_run() as run:
        trainer = trainer_of(run, micro_batch="auto")
        for batch in trainer.steps(trainer.loader(Long(), batch_size=128), max_steps=2):
            run.log(loss=trainer.step(batch))
        size = trainer._cut.size
        assert isinstance(size, int)
        assert 1 <= size < 128
    del trainer
    twice = min(128, 4 * size)
    of_memory(0.5)
    with open_run("larger") as run:
        trainer = trainer_of(run, micro_batch=twice)
        batch = next(iter(trainer.steps(trainer.loader(Long(), batch_size=128), max_steps=2)))
        with pytest.raises(OutOfMemory, match=r"Use micro_batch=\d+, which was tried") as failed:
            trainer.step(batch)
    fits = int(str(failed.value).partition("micro_batch=")[2].partition(",")[0])
    assert fits < twice


def test_memory_that_runs_out_in_the_middle_halves_the_micro_batch(
    open_run: OpenRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    with open_run() as run:
        trainer = trainer_of(run, micro_batch="auto")
        for batch in trainer.steps(trainer.loader(Long(), batch_size=64), max_steps=4):
            if run.step == 2:
                before = trainer._cut.size
                of_memory(1.0)
            loss = trainer.step(batch)
            run.log(loss=loss)
        assert trainer._cut.size < before
        assert loss.isfinite()


def test_what_a_checkpoint_holds_is_of_the_step_it_was_made_at(open_run: OpenRun) -> None:
    """Steps that follow at once do not change what is being written."""
    with open_run() as run:
        trainer = trainer_of(run, checkpoint_every="10h")
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=20):
            run.log(loss=trainer.step(batch))
            if run.step == 5:
                expected = {name: w.clone() for name, w in trainer.model.state_dict().items()}
                trainer.checkpoint()
    kept = run.directory.path / "checkpoints"
    for folder in kept.iterdir():
        if int("".join(c for c in folder.name if c.isdigit())) > 5:
            shutil.rmtree(folder)
    with open_run() as run:
        again = trainer_of(run)
        for name, weight in again.model.state_dict().items():
            assert torch.equal(weight, expected[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_metrics_from_two_gpus_are_waited_for_on_both() -> None:
    """The second GPU is busy for a second when its value is logged; the first is idle."""
    values = {f"of-{gpu}": torch.full((), gpu + 1.0, device=f"cuda:{gpu}") for gpu in range(2)}
    values["of-1"].mul_(1)
    Deferred(values).read()  # loads the kernel and allocates pinned memory, which may wait for the device
    with torch.cuda.device(1):
        torch.cuda._sleep(2 * 10**9)  # clock cycles
        values["of-1"].mul_(3)
        logged = Deferred(values)
    assert not logged.arrived
    assert logged.read() == {"of-0": 1.0, "of-1": 6.0}
    assert logged.arrived
