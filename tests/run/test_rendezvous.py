"""Ranks of one launch that find each other by the run's directory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import stoker
import torch
from stoker import config as configs
from stoker.redaction import REDACTED
from stoker.run import journal, opening, rendezvous, view
from stoker.run.directory import RunDirectory

import ranks
from support import LONG


def test_an_attempt_does_not_end_before_all_ranks_take_part(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a" / "b")
    run.prepare()
    number, _ = journal.start_attempt(run.journal)
    journal.join_attempt(run.journal, number + 1, 1)  # another's
    joins = threading.Timer(0.3, journal.join_attempt, (run.journal, number, 1))
    began = time.monotonic()
    joins.start()
    rendezvous.wait_for_others(run, number, 2, timeout=2 * LONG)
    assert 0.3 <= time.monotonic() - began < LONG
    rendezvous.wait_for_others(run, number, 3, timeout=0.2)  # one never comes


def test_what_belongs_to_a_machine_may_differ_between_ranks() -> None:
    def record(**config: object) -> dict[str, Any]:
        sources = dict.fromkeys(config, "command line") | {"cores": "default"}
        return {"config": config, "sources": sources, "recipe": {"name": "mine"}}

    there = record(lr=0.1, data="/a/data", files="data", cores=8, token=REDACTED, steps=10)
    here = record(lr=0.2, data="/b/data", files="other", cores=4, token="ours", steps=20, more=1)
    found = opening.differences(here, there, {"steps": (10, 20)})
    assert found.refused == {"lr": (0.2, 0.1), "files": ("other", "data")}
    assert found.allowed == {"data": ("/b/data", "/a/data")}
    assert not opening.differences({**here, "recipe": {}}, there, {}).refused


@pytest.mark.parametrize(
    ("one", "other", "may"),
    [
        ("/a/x", "/b/y", True), ("a/x", "b/x", False), ("/a/x", "x", False),
        ("/a:0.5,/b:0.5", "/c:0.5,/d:0.5", True), ("/a:0.5,/b:0.5", "/a:0.9,/b:0.1", False),
        ("/a:1e-3,/b", "/a:2e-3,/b", False),
        ("tiny,/s1/b", "tiny,/s2/b", True), ("/a,tiny", "/a,other", False), ("/a,/b", "/a", False),
        (["/a", "x"], ["/b", "x"], True), (["/a"], ["/a", "/b"], False),
        ({"/a": "text"}, {"/b": "text"}, True), ({"/a": "text"}, {"/b": "body"}, False),
        (f"hf://{REDACTED}", "hf://ours", True), (None, "/a", False), (1, 2, False), (2, 2, True),
    ],
)  # fmt: skip
def test_which_values_may_differ_between_machines(one: object, other: object, may: bool) -> None:
    assert configs.may_differ("data", one, other) == may
    assert configs.may_differ("loader.workers", 1, 2)


TWICE = """
import os, sys, time, stoker
for n in range(2):
    with stoker.Run("x", "a", runs=sys.argv[1]) as run:
        run.log(loss=float(os.environ["RANK"]), reduce="sum")
        time.sleep(0.5 if run.world.rank == 0 else 0.0)
"""


def test_a_rank_that_opens_the_run_again_waits_for_rank_zero_to_do_so(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "twice"},
        )
        for rank in range(2)
    ]
    assert [process.wait(LONG) for process in processes] == [0, 0]
    found = view.load(RunDirectory(tmp_path / "x" / "a"))
    assert [attempt.status for attempt in found.attempts] == ["finished", "finished"]
    assert found.points["loss"] == {1: 1.0, 2: 1.0}


def begin_trainer(runs: Path) -> bool:
    """Whether this rank takes the run to have existed before."""
    with stoker.Run("x", "a", runs=runs) as run:
        stoker.Trainer(
            run, torch.nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss=lambda output, batch: (output.sum(), len(batch)),
        )  # fmt: skip
        return run.continued


def test_ranks_agree_that_a_run_is_continued_whose_first_attempt_is_not_in_its_journal(
    tmp_path: Path,
) -> None:
    """It was killed between the two; or a store got its record, and was away before it got the journal."""
    with stoker.Run("x", "a", runs=tmp_path) as run:
        run.log(loss=1.0)
    for file in run.directory.journal.iterdir():
        file.unlink()
    run.directory.compacted.unlink(missing_ok=True)
    assert ranks.run(begin_trainer, 2, tmp_path, tmp_path, timeout=LONG) == [True, True]
