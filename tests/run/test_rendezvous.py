"""Ranks of one launch that find each other by the run's directory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from stoker.run import journal, rendezvous
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
