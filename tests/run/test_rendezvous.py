"""Ranks of one launch that find each other by the run's directory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from stoker.run import journal, rendezvous, view
from stoker.run.directory import RunDirectory


def test_an_attempt_does_not_end_before_all_ranks_take_part(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a" / "b")
    run.prepare()
    number, _ = journal.start_attempt(run.journal)
    journal.join_attempt(run.journal, number + 1, 1)  # another's
    joins = threading.Timer(0.3, journal.join_attempt, (run.journal, number, 1))
    began = time.monotonic()
    joins.start()
    rendezvous.wait_for_others(run, number, 2, timeout=60)
    assert 0.3 <= time.monotonic() - began < 30
    rendezvous.wait_for_others(run, number, 3, timeout=0.2)  # one never comes


TWICE = """
import os, sys, time, stoker
for n in range(2):
    with stoker.Run("x", "a", runs=sys.argv[1]) as run:
        run.log(loss=float(os.environ["RANK"]), reduce="sum")
        time.sleep(0.5 if run.world.rank == 0 else 0.0)
"""


def test_a_rank_that_opens_the_run_again_waits_for_rank_zero_to_do_so(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "twice"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    found = view.load(RunDirectory(tmp_path / "x" / "a"))
    assert [attempt.status for attempt in found.attempts] == ["finished", "finished"]
    assert found.points["loss"] == {1: 1.0, 2: 1.0}
