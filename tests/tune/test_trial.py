"""What a trial says of itself, over a real pipe."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from stoker import Run, Trainer, Training
from stoker.run import view
from stoker.tune import seen, trial
from stoker.tune.trial import Link, Reporter
from torch.utils.data import TensorDataset

from support import LONG


def test_what_is_measured_before_the_first_step_is_not_reported(tmp_path: Path) -> None:
    here, there = Pipe()
    link = Link(there)
    dataset = TensorDataset(torch.ones(8, 1))
    with Run("test", "a", runs=tmp_path / "runs") as run:
        reporter = Reporter(run.attempt, ("val_loss",), "epoch", link, waits=False)
        run.attempt.listen(reporter)
        trainer = Trainer(
            run, torch.nn.Linear(1, 1), optimizer=torch.optim.SGD,
            loss=lambda output, batch: (output.sum(), len(output)), training=Training(precision="fp32"),
        )  # fmt: skip
        run.log(val_loss=9.0)
        for batch in trainer.steps(trainer.loader(dataset, batch_size=4), max_steps=2):
            trainer.step(batch)
            run.log(val_loss=1.0 / run.step)
    reporter.close()
    link.tell("ended")
    there.close()
    said = [report for message in _messages(here) for report in message["reports"]]
    assert [(report["step"], report["value"], report["per_step"]) for report in said] == [
        (1, 1.0, 0.5), (2, 0.5, 0.5),
    ]  # fmt: skip
    assert seen.points(view.load(run.directory), "val_loss") == {1.0: 1.0, 2.0: 0.5}, (
        "nor when it is taken in"
    )


def _said(folder: Path, first: int) -> list[dict[str, Any]]:
    """What a trial says of 101 reports that nobody answers; some word is waited for after so many."""
    here, there = Pipe()
    link = Link(there)
    with Run("test", "a", runs=folder / "runs") as run:
        reporter = Reporter(run.attempt, ("val_loss",), "step", link, waits=False)
        run.attempt.listen(reporter)
        for step in range(1, 102):
            run.log(val_loss=1.0 / step)
            if step == first:
                assert here.poll(LONG)  # without another report, and before the end
        reporter.close()
    link.tell("ended")
    there.close()
    said = list(_messages(here))
    assert [report["step"] for one in said for report in one["reports"]] == list(range(1, 102))
    return said


def test_reports_that_nobody_answers_are_sent_together_and_not_late(tmp_path: Path) -> None:
    assert len(_said(tmp_path, first=100)) < 50


def test_the_last_reports_go_with_the_word_that_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_HELD", LONG)
    (last,) = _said(tmp_path, first=0)
    assert last["kind"] == "ended"


def _messages(connection: Connection) -> Iterator[dict[str, Any]]:
    """Whatever was said until the other end was closed."""
    try:
        while True:
            yield connection.recv()
    except EOFError:
        return
