"""What a trial says of itself, over a real pipe."""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path

import torch
from stoker import Run, Trainer, Training
from stoker.tune.trial import Link, Reporter
from torch.utils.data import TensorDataset


def test_what_is_measured_before_the_first_step_is_not_reported(tmp_path: Path) -> None:
    here, there = Pipe()
    dataset = TensorDataset(torch.ones(8, 1))
    with Run("test", "a", runs=tmp_path / "runs") as run:
        run.listen(Reporter(run, ("val_loss",), "epoch", Link(there), waits=False))
        trainer = Trainer(
            run, torch.nn.Linear(1, 1), optimizer=torch.optim.SGD,
            loss=lambda output, batch: (output.sum(), len(output)), training=Training(precision="fp32"),
        )  # fmt: skip
        run.log(val_loss=9.0)
        for batch in trainer.steps(trainer.loader(dataset, batch_size=4), max_steps=2):
            trainer.step(batch)
            run.log(val_loss=1.0 / run.step)
    there.close()
    said = [json.loads(here.recv_bytes()) for _ in range(2)]
    assert [(report["step"], report["value"], report["per_step"]) for report in said] == [
        (1, 1.0, 0.5), (2, 0.5, 0.5),
    ]  # fmt: skip
