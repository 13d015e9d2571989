"""`--max-restarts`, preemption and standstills: real ranks, real signals."""

from __future__ import annotations

import array
import contextlib
import fcntl
import math
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from stoker import Run, supervision
from stoker.checkpoint import manifest
from stoker.launch import alone
from test_launch import RECIPE, SLOW, _ranks, _weights, slow_until

from commands import Command, Start
from support import LONG, loaded, pending, suspend, until, wait_for_points

SAME = (*SLOW, "--nproc", "2")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(here: Path, stoker: Command) -> Path:
    """The run of `SAME` that nothing interrupts."""
    run = here / "runs" / "ranked" / "whole"
    if not run.exists():
        done = stoker("train", RECIPE, *SAME, "pause=0", "--name", "whole", cwd=here)
        assert done.code == 0, done.err
    return run


def _kill_at(process: subprocess.Popen[bytes], run: Path, points: int, rank: int) -> None:
    wait_for_points(process, run, points)
    _ranks(process)[rank].kill()


def _newest(run: Path) -> str:
    """The newest checkpoint's name."""
    return manifest.committed(run / "checkpoints")[-1].name


def test_ranks_that_are_killed_are_started_again_and_come_to_the_same_bits(
    whole: Path, start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "ranked" / "a"
    go = tmp_path / "go"
    slow = (*SAME, *slow_until(go, 50, pause=0.25))
    process = start("train", RECIPE, *slow, "--name", "a", "--max-restarts", "1")
    _kill_at(process, run, 50, 1)
    before = _newest(run)
    until(lambda: _newest(run) > before, process)  # with a checkpoint between them both are the first
    _kill_at(process, run, 2, 0)
    go.touch()
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err.decode()
    assert "rank 1 was killed by SIGKILL" in err.decode()
    assert "starting again; restarts left: 0" in err.decode()
    seen = loaded(run)
    assert seen.status == "finished"
    assert len(seen.attempts) == 3
    assert [a.error and a.error.partition(":")[0] for a in seen.attempts] == [
        "rank 1 was killed by SIGKILL", "rank 0 was killed by SIGKILL", None,
    ]  # fmt: skip
    assert len(seen.points["loss"]) == 200
    assert _weights(run) == _weights(whole)


def test_what_processes_that_were_killed_have_left_is_removed_in_silence() -> None:
    """Python's tracker, which removes the semaphores of their workers, says so of each otherwise."""
    leaving = (
        "import multiprocessing, os, signal; from stoker import forkserver; forkserver.start(());"
        "kept = multiprocessing.get_context('forkserver').Semaphore(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", leaving], check=False, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""


def test_one_process_is_started_again_too(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "ranked" / "a"
    go = tmp_path / "go"
    process = start("train", RECIPE, *SLOW, *slow_until(go, 50), "--name", "a", "--max-restarts", "2")
    _kill_at(process, run, 50, 0)
    go.touch()
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err.decode()
    assert len(loaded(run).attempts) == 2


def test_what_fails_at_the_same_step_again_is_given_up_with_both_tracebacks(
    stoker: Command, tmp_path: Path
) -> None:
    """Right after a checkpoint too: the second time it does no step before."""
    again = ("checkpoint_every=19", "--max-restarts", "5")
    done = stoker("train", RECIPE, "fail_rank=1", "--nproc", "2", "--name", "a", *again)
    assert done.code == 1
    assert "it fails at step 20 every time, so it is not started again" in done.err
    last = done.err[done.err.index("it fails at step 20") :]
    assert last.count("RuntimeError: what one rank cannot do") == 2
    assert len(loaded(tmp_path / "runs" / "ranked" / "a").attempts) == 2


def test_what_the_user_must_change_is_not_tried_again(stoker: Command, tmp_path: Path) -> None:
    done = stoker("train", RECIPE, "nan_at=20", "--nproc", "2", "--name", "a", "--max-restarts", "5")
    assert done.code == 1
    assert "step 20: the loss is nan; the weights are those from before this step" in done.err
    assert "starting again" not in done.err
    assert len(loaded(tmp_path / "runs" / "ranked" / "a").attempts) == 1


def test_ranks_that_stand_still_leave_their_stacks_and_are_started_again(
    whole: Path, stoker: Command, tmp_path: Path
) -> None:
    done = stoker(
        "train", RECIPE, *SAME, "pause=0", "deaf_rank=1", "hang_limit=10s", "checkpoint_every=15",
        "--name", "a", "--max-restarts", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    # Rank 0 waits for rank 1 from a moment later on, and may be within the limit when that is over it.
    assert re.search(r"(2 ranks hang|rank 1 hangs): no progress after step 19 for", done.err), done.err
    slept, stepped = (_line_of(text) for text in ("time.sleep(600)", "trainer.step(batch)"))
    assert f"rank 1 at ranked.py:{slept}" in done.err
    assert f"rank 0 at ranked.py:{stepped} (in step)" in done.err
    run = tmp_path / "runs" / "ranked" / "a"
    (folder,) = (run / "logs").glob("stacks-*")
    stacks = {file.name: file.read_text() for file in folder.iterdir()}
    assert stacks.keys() == {"rank-0.txt", "rank-1.txt"}
    assert "ranked.py" in stacks["rank-1.txt"]
    assert "in train" in stacks["rank-0.txt"]
    assert _weights(run) == _weights(whole)


def _line_of(text: str) -> int:
    """The number of the recipe's line that has a text."""
    lines = Path(RECIPE).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def test_a_process_alone_that_stands_still_leaves_its_stacks(stoker: Command, tmp_path: Path) -> None:
    done = stoker("train", RECIPE, "deaf_rank=0", "hang_limit=8s", "--name", "a", "--json")
    assert done.code == 1
    assert "it hangs: no progress after step 19 for" in done.err
    assert f"; it is at ranked.py:{_line_of('time.sleep(600)')}; the stacks" in done.err
    assert done.answer["exit_code"] == 1
    run = tmp_path / "runs" / "ranked" / "a"
    (file,) = (run / "logs").glob("stacks-*/rank-0.txt")
    assert 'ranked.py", line' in file.read_text()
    seen = loaded(run)
    assert seen.status == "killed"
    assert "no progress after step 19" in str(seen.attempts[-1].error)


def test_a_process_alone_that_takes_long_is_only_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no limit was given: nobody starts it again, and an evaluation may just be long."""
    monkeypatch.delenv(supervision.FOLDER, raising=False)

    def warnings() -> list[str]:
        once = {id(record): record.getMessage() for record in caplog.records}  # two loggers may hand it on
        return [said for said in once.values() if "hang_limit" in said]

    with Run("test", "a", runs=tmp_path) as run:
        run.attempt.heart = supervision.Heart(0.5)
        run.attempt.heart.beat(1)
        with alone.watching(run.attempt, pytest.fail, ends=False):
            until(warnings)
            time.sleep(2.5)
    (said,) = warnings()
    assert "no progress after step 1 for" in said
    assert len(list(run.directory.logs.glob("stacks-*/rank-0.txt"))) == 1


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_the_warning_of_slurm_makes_a_checkpoint_and_exits_75(
    nproc: str, start: Start, tmp_path: Path
) -> None:
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", nproc, "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 10)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    seen = loaded(run)
    assert seen.status == "preempted"
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()


def test_told_to_stop_between_two_attempts_it_ends_as_at_any_other_time(start: Start, tmp_path: Path) -> None:
    """Held up there: what it says of the first attempt is more than the pipe takes in which nobody reads."""
    said = tmp_path / "said"
    os.mkfifo(said)
    with os.fdopen(os.open(said, os.O_RDONLY | os.O_NONBLOCK), "rb") as unread:
        process = start(
            "train", RECIPE, "fail_rank=0", "padding=100000", "--name", "a", "--max-restarts", "3",
            first=f"import os; os.dup2(os.open({str(said)!r}, os.O_WRONLY), 2)",
        )  # fmt: skip
        held = array.array("i", [0])
        while held[0] < 1 << 15 and process.poll() is None:
            time.sleep(0.01)
            fcntl.ioctl(unread, termios.FIONREAD, held)
        process.terminate()
        os.set_blocking(unread.fileno(), True)
        unread.read()
    assert process.wait(LONG) == 75


def test_a_second_signal_ends_it_at_once_and_the_newest_checkpoint_stays(
    start: Start, stoker: Command, tmp_path: Path
) -> None:
    slow = (*SLOW, "pause=60", "pause_from=3", "checkpoint_every=1", "steps=5000")
    process = start("train", RECIPE, *slow, "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 3)
    time.sleep(1)  # Python answers a signal that comes just before it sleeps with the next one that wakes it
    process.send_signal(signal.SIGTERM)
    until(lambda: not pending(process.pid, signal.SIGTERM), process)
    time.sleep(5)  # two within a second are one
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    found = stoker("checkpoints", "verify", "a", "--json")
    assert found.code == 0, found.out
    newest = max(checkpoint["step"] for checkpoint in found.answer["checkpoints"])
    assert newest < max(loaded(run).points["loss"]), "it waited for the end of the step"


def test_a_second_signal_ends_ranks_that_cannot_hear_it(start: Start, tmp_path: Path) -> None:
    """One is stopped, so that the other waits for it within gloo, where no handler runs."""
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 30)
    until(lambda: manifest.committed(run / "checkpoints"), process)
    ranks = _ranks(process)
    suspend(ranks[1].pid)
    try:
        process.send_signal(signal.SIGINT)
        until(lambda: pending(ranks[1].pid, signal.SIGINT), process)  # the launcher has passed it on
        time.sleep(3)  # two within a second are one
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LONG)
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
    assert process.returncode == 75, err.decode()
    assert "told to stop twice: ending at once" in err.decode()
    assert loaded(run).attempts[-1].error == "told to stop twice, so its ranks were ended at once"
    newest, passed_over = manifest.newest(run / "checkpoints")
    assert newest is not None
    assert newest.step >= 20
    assert all("saving it did not finish" in said for said in passed_over), passed_over


def test_a_signal_that_everybody_sends_is_one(start: Start, tmp_path: Path) -> None:
    """A scheduler signals the ranks, and the launcher too, which passes it on, here two seconds later."""
    slow = (*SLOW, "pause=5", "pause_from=3", "steps=5000")
    process = start("train", RECIPE, *slow, "--nproc", "2", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 3)
    time.sleep(1)  # Python answers a signal that comes just before it sleeps with the next one that wakes it
    ranks = _ranks(process)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    until(lambda: not any(pending(rank.pid, signal.SIGTERM) for rank in ranks), process)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    seen = loaded(run)
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()


def test_the_clock_stops_it_as_a_signal_does(stoker: Command, tmp_path: Path) -> None:
    done = stoker("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a", "--max-time", "8s")
    assert done.code == 75, done.err
    seen = loaded(tmp_path / "runs" / "ranked" / "a")
    assert (seen.status, 0 < seen.step < 5000) == ("preempted", True)
    bad = stoker("train", RECIPE, "--max-time", "soon")
    assert (bad.code, "give one such as 3h55m" in bad.err) == (2, True)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_batch_that_is_bad_is_left_out_on_all_ranks(policy: str, stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "train", RECIPE, "precision=fp32", "nan_at=30", f"on_bad_loss={policy}", "checkpoint_every=20",
        "--nproc", "2", "--name", "a", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "step 30: the loss is nan; samples 464 to 479 are left out" in done.err
    run = tmp_path / "runs" / "ranked" / "a"
    assert ("rewound the weights to those of step 20" in done.err) == (policy == "rewind")
    assert done.answer["step"] == 60
    shown = " ".join(stoker("runs", "show", "a").out.split())
    back = "; the weights went back to those of step 20" if policy == "rewind" else ""
    assert f"left out 1 batch, at step 30{back} started" in shown
    (batch,) = stoker("runs", "show", "a", "--json").answer["left_out"]
    assert (batch["step"], batch["samples"], batch["reason"]) == (30, [464, 479], "the loss is nan")
    assert batch["rewound_to"] == (20 if policy == "rewind" else None)
    assert f"Left out: 1 batch, at step 30{back}." in (run / "artifacts" / "report.html").read_text()
    assert all(math.isfinite(value) for values in _weights(run).values() for value in _flat(values))


def _flat(values: object) -> list[float]:
    return [v for part in values for v in _flat(part)] if isinstance(values, list) else [values]  # type: ignore[list-item]


def test_ranks_that_run_out_of_memory_take_smaller_micro_batches_and_go_on(
    stoker: Command, tmp_path: Path
) -> None:
    """Two starts again, which are of no restart's budget; the global batch is what it was."""
    same = ("train", RECIPE, "precision=fp32", "dropout=0", "--nproc", "2")
    done = stoker(*same, "micro_batch=auto", "fits=2", "checkpoint_every=5", "--name", "a")
    assert done.code == 0, done.err
    assert "out of memory on rank 1: Tried to allocate 2 GiB. 1 GiB is free." in done.err
    assert "The next start takes 4" in done.err
    assert "The next start takes 2" in done.err
    assert stoker(*same, "--name", "whole").code == 0
    runs = tmp_path / "runs" / "ranked"
    seen, whole = loaded(runs / "a"), loaded(runs / "whole")
    assert len(seen.attempts) == 3
    assert list(seen.points["loss"].y) == pytest.approx(list(whole.points["loss"].y), rel=1e-4)


def test_what_cannot_take_less_memory_is_not_tried_again(stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "train", RECIPE, "fits=2", "micro_batch=4", "--nproc", "2", "--max-restarts", "3", "--name", "a"
    )
    assert done.code == 1
    assert (
        "Use micro_batch=2 or less (auto finds the largest that fits): the result stays the same" in done.err
    )
    assert len(loaded(tmp_path / "runs" / "ranked" / "a").attempts) == 1
