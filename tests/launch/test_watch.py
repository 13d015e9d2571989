"""What the launcher does with ranks that are left when one has failed: real processes, and their files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from stoker import supervision
from stoker.errors import Stopped
from stoker.launch import local, pulses, ranks, watch
from stoker.launch.budget import RankFailed

from support import LONG, suspend, until

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
    begun = time.monotonic()
    with watch.watching(tmp_path, 2, lambda: ""):
        assert works.wait(60) == -signal.SIGKILL
    assert time.monotonic() - begun >= 2.0


def test_of_ranks_that_are_gone_at_one_look_the_one_that_was_killed_is_named(tmp_path: Path) -> None:
    """Elastic tells only of the first, which lost its peer."""
    killed = multiprocessing.get_context("fork").Process(target=signal.pause)
    killed.start()
    with watch.watching(tmp_path, 2, lambda: "") as watched:
        until(lambda: killed in watched._processes)
        (tmp_path / "rank-1.pid").write_text(str(killed.pid))
        killed.kill()
        killed.join()
    lost = ranks.End(0, time.time(), 1, "Connection closed by peer", "Traceback", again=True)
    with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL") as caught:
        local._raise_first({0: lost}, {0: 1}, watched)
    assert not caught.value.raised
    watched._ended.add(1)
    with pytest.raises(RankFailed, match="rank 0 failed"):
        local._raise_first({0: lost}, {0: 1}, watched)


CLOCK = """
import sys, time
from pathlib import Path
clock, later = time.monotonic, Path(sys.argv[1]) / "later"
time.monotonic = lambda: clock() + (float(later.read_text()) if later.exists() else 0.0)
"""
LAUNCHER = f"""{CLOCK}
from stoker.launch import watch
with watch.watching(Path(sys.argv[1]), 1, lambda: "") as watched:
    print("watches", flush=True)
    while not watched.verdict:
        time.sleep(0.05)
"""
RANK = f"""{CLOCK}
from stoker import supervision
from stoker.errors import Stopped
supervision.write_stacks_to(Path(sys.argv[1]) / "rank-0.stacks")
heart = supervision.Heart(limit=float(sys.argv[3]))
for step in range(int(sys.argv[2])):
    heart.beat(step)
    time.sleep(0.05)
time.sleep(600)
"""


def test_ranks_that_were_stopped_with_their_launcher_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an hour, by the clock that both have here."""
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path))
    works = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), "100000", "60"])
    (tmp_path / "rank-0.pid").write_text(str(works.pid))
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"watches\n"
        while not any(pulse.begun for pulse in pulses.read(tmp_path).values()):
            time.sleep(0.05)
        for process in (launcher, works):
            suspend(process.pid)
        (tmp_path / "later").write_text("3600")
        launcher.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        works.send_signal(signal.SIGCONT)
        time.sleep(2.0)
        assert works.poll() is None
        suspend(works.pid)  # it alone: that is to hang
        _limit(tmp_path / "rank-0.pulse", 0.1)
        assert works.wait(60) == -signal.SIGKILL
    finally:
        for process in (launcher, works):
            process.kill()
            process.wait()
        if launcher.stdout is not None:
            launcher.stdout.close()


def _limit(file: Path, seconds: float) -> None:
    """Shorten the time without progress that the rank of a pulse may take."""
    step, saved, at, _, joining, begun = supervision.LAYOUT.unpack(file.read_bytes())
    file.write_bytes(supervision.LAYOUT.pack(step, saved, at, seconds, joining, begun))


def test_ranks_that_hang_are_ended_where_their_stacks_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path))
    (tmp_path / supervision.RUN).write_text(str(tmp_path / supervision.RUN))  # a file: no folder can be below
    hangs = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), "1", "2"])
    (tmp_path / "rank-0.pid").write_text(str(hangs.pid))
    try:
        with watch.watching(tmp_path, 1, lambda: "") as watched:
            assert hangs.wait(60) == -signal.SIGKILL
        assert "rank 0 hangs: " in watched.verdict
        assert "could not be saved ([Errno 20] Not a directory" in watched.verdict
    finally:
        hangs.kill()
        hangs.wait()


SLOW_TO_ANSWER = """
import signal, sys, time
from pathlib import Path
from stoker import supervision

def answer(number, frame):
    time.sleep(1.0)
    Path(sys.argv[1], "rank-0.stacks").write_text("where it is")

signal.signal(supervision.STACKS, answer)
supervision.Heart(limit=1.0).beat(1)
while True:
    time.sleep(600)
"""


def test_stacks_are_waited_for_until_each_rank_has_written_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path))
    monkeypatch.setattr(watch, "_STACKS", 0.1)
    monkeypatch.setattr(watch, "_STACKS_AT_MOST", LONG)
    (tmp_path / "rank-0.stacks").touch()
    hangs = subprocess.Popen([sys.executable, "-c", SLOW_TO_ANSWER, str(tmp_path)])
    (tmp_path / "rank-0.pid").write_text(str(hangs.pid))
    try:
        with watch.watching(tmp_path, 1, lambda: ""):
            assert hangs.wait(LONG) == -signal.SIGKILL
    finally:
        hangs.kill()
        hangs.wait()
    (kept,) = tmp_path.glob("stacks-*/rank-0.txt")
    assert kept.read_text() == "where it is"


def test_a_signal_is_passed_on_whatever_else_goes_wrong(rank: Rank, tmp_path: Path) -> None:
    wrong = threading.Event()

    def outside() -> str:
        wrong.set()
        raise OSError("no space left")

    works = rank(0, "works")
    with watch.watching(tmp_path, 1, outside):
        assert wrong.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert works.wait(60) == -signal.SIGTERM


STACKS = """\
Thread 0x00007f0000000001 (most recent call first):
  File "{here}/other.py", line 3 in of_a_thread

Current thread 0x00007f0000000002 (most recent call first):
{frames}"""
LIBRARY = Path(supervision.__file__).parent


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (
            [
                f'"{torch.__file__}", line 9 in wait',
                f'"{LIBRARY}/trainer.py", line 9 in step',
                '"/a b/train.py", line 31 in evaluate',
            ],
            "train.py:31 (in step)",
        ),
        (['"/a b/train.py", line 31 in evaluate', '"/a b/train.py", line 50 in <module>'], "train.py:31"),
        ([f'"{LIBRARY}/trainer.py", line 9 in steps', f'"{os.__file__}", line 1 in system'], ""),
        ([], ""),
    ],
)
def test_a_place_is_the_innermost_line_of_the_users(frames: list[str], said: str, tmp_path: Path) -> None:
    lines = "".join(f"  File {frame}\n" for frame in frames)
    assert pulses.place(STACKS.format(here=tmp_path, frames=lines)) == said


def test_what_repeats_a_request_does_not_interrupt_how_it_is_answered(rank: Rank, tmp_path: Path) -> None:
    """Before there are ranks, Stopped is raised, and what runs then ends the server of their processes."""
    looking = watch.Watch(tmp_path, 2)
    with pytest.raises(Stopped):
        looking.pass_on(signal.SIGTERM, None)
    looking.pass_on(signal.SIGHUP, None)
    assert looking.told == signal.SIGTERM
