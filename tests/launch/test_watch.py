"""What the launcher does with ranks that are left when one has failed: real processes, and their files."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stoker import supervision
from stoker.launch import watch

Rank = Callable[[int, str], subprocess.Popen[bytes]]


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    """Start a process that stands for a rank, which has just begun to do something."""
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path))
    processes = []

    def made(number: int, does: str) -> subprocess.Popen[bytes]:
        monkeypatch.setenv("RANK", str(number))
        if does == "joins":
            supervision.joining(True)
        else:
            supervision.Heart().beat(3)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / f"rank-{number}.pid").write_text(str(process.pid))
        processes.append(process)
        return process

    yield made
    for process in processes:
        process.kill()
        process.wait()


def test_a_rank_that_waits_for_one_that_is_gone_is_ended_at_once(
    rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LAST_WORDS", 600.0)
    waits, gone = rank(0, "joins"), rank(1, "joins")
    gone.kill()
    gone.wait()
    with watch.watching(tmp_path, 2, lambda: ""):
        assert waits.wait(60) == -signal.SIGKILL


def test_a_rank_that_may_have_something_to_finish_is_given_time(
    rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_WAITING", 0.0)
    monkeypatch.setattr(watch, "_LAST_WORDS", 2.0)
    works, gone = rank(0, "works"), rank(1, "joins")
    gone.kill()
    gone.wait()
    with watch.watching(tmp_path, 2, lambda: ""):
        with pytest.raises(subprocess.TimeoutExpired):
            works.wait(1)
        assert works.wait(60) == -signal.SIGKILL
