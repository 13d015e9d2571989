"""`--nproc`: ranks on this machine, with real signals."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from commands import Command, Start
from support import LONG, loaded, until, wait_for_points

RECIPE = str(Path(__file__).parent / "ranked.py")
SLOW = ("precision=fp32", "pause=0.02", "steps=200", "checkpoint_every=20")


def slow_until(file: Path, after: int, pause: float = 0.5) -> tuple[str, ...]:
    """So slow after a step that it is still there for what a test does to it then, until there is a file."""
    return (f"pause={pause}", f"pause_from={after}", f"until={file}")


def _ranks(launcher: subprocess.Popen[bytes], temporary: Path | None = None) -> list[psutil.Process]:
    """The ranks of a launcher, by number; each says who it is where the launcher's others find it.

    Args:
        temporary: the launcher's folder for temporary files, if it is not this process's.
    """
    found = {}
    known = psutil.Process(launcher.pid)
    children = {process.pid: process for process in known.children(recursive=True)}
    pids = f"{temporary or tempfile.gettempdir()}/stoker-launch-*/rank-*.pid"
    for file in map(Path, glob.glob(pids)):  # noqa: PTH207 - which raises if another launch's folder vanishes
        with contextlib.suppress(FileNotFoundError):  # another test's, whose launch is over
            pid, made = int(file.read_text()), file.stat().st_mtime
            if pid in children and made >= known.create_time():  # of this one
                found[int(file.stem.removeprefix("rank-"))] = children[pid]
    return [found[rank] for rank in sorted(found)]


def _weights(run: Path) -> dict[str, list[float]]:
    return {n: t.flatten().tolist() for n, t in load_file(run / "artifacts" / "model.safetensors").items()}


def test_two_ranks_train_one_run_each_with_its_log(stoker: Command, tmp_path: Path) -> None:
    same = ("train", RECIPE, "precision=fp32", "dropout=0", "--json")
    done = stoker(*same, "--nproc", "2", "--name", "two")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "ranked" / "two"
    assert done.answer["step"] == 60
    assert len(loaded(run).points["loss"]) == 60
    assert loaded(run).attempts[-1].world == 2
    assert {file.name for file in (run / "logs").glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    alone = stoker(*same, "--name", "one")
    assert done.answer["metrics"]["loss"] == pytest.approx(alone.answer["metrics"]["loss"], rel=1e-3)


def test_the_first_rank_to_fail_is_the_one_that_is_shown(stoker: Command, tmp_path: Path) -> None:
    done = stoker("train", RECIPE, "fail_rank=1", "--nproc", "2", "--name", "a")
    assert done.code == 1
    assert "rank 1 failed:" in done.err
    assert done.err.count("Traceback") == 1, done.err
    assert "RuntimeError: what one rank cannot do" in done.err
    assert loaded(tmp_path / "runs" / "ranked" / "a").status == "failed"


def test_a_rank_that_does_not_end_is_ended_soon_and_not_blamed(stoker: Command, tmp_path: Path) -> None:
    """It would sleep for longer than `stoker` waits for the end."""
    done = stoker("train", RECIPE, "fail_rank=1", "deaf_rank=0", "--nproc", "2", "--name", "a")
    assert done.code == 1
    assert "RuntimeError: what one rank cannot do" in done.err
    assert "SIGKILL" not in done.err
    seen = loaded(tmp_path / "runs" / "ranked" / "a")
    assert seen.status == "failed"  # although the rank that says so was ended
    assert (seen.attempts[-1].error or "").startswith("rank 1: RuntimeError: what one rank cannot do")


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGHUP, 130, "interrupted")]
)
def test_a_signal_to_the_whole_process_group_costs_no_checkpoint(
    number: signal.Signals, code: int, status: str, start: Start, tmp_path: Path
) -> None:
    """As `timeout`, systemd, Slurm and a terminal send it: the server of the ranks hears it too."""
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 10)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == code, err.decode()
    seen = loaded(run)
    assert seen.status == status
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_to_the_same_bits(
    stoker: Command, start: Start, tmp_path: Path
) -> None:
    runs = tmp_path / "runs" / "ranked"
    go = tmp_path / "go"
    same = ("train", RECIPE, *SLOW, "steps=100", "--nproc", "2")
    process = start(*same, *slow_until(go, 30), "--name", "killed")
    wait_for_points(process, runs / "killed", 30)
    _ranks(process)[1].kill()
    go.touch()
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in err.decode()
    resumed = stoker("resume", "killed")
    assert resumed.code == 0, resumed.err
    assert "resumed killed from step" in resumed.err
    whole = stoker(*same, "pause=0", "--name", "whole")
    assert whole.code == 0, whole.err
    assert _weights(runs / "killed") == _weights(runs / "whole")
    assert len(loaded(runs / "killed").points["loss"]) == 100


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGTERM, 75, "preempted"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGHUP, 130, "interrupted"),
    ],
)
def test_told_to_stop_all_ranks_stop_after_the_same_step(
    number: signal.Signals, code: int, status: str, stoker: Command, start: Start, tmp_path: Path
) -> None:
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 10)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == code, err.decode()
    seen = loaded(run)
    assert seen.status == status
    assert f"{status} at step {seen.step}" in out.decode()
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()


@pytest.mark.parametrize("there", ["stoker-launch-*", "stoker-launch-*/rank-*.pid"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 130)],
    ids=["sigterm", "sigint", "sighup"],
)
def test_told_to_stop_while_they_come_up_ranks_end_quietly(
    there: str, number: signal.Signals, code: int, start: Start, tmp_path: Path
) -> None:
    env = {"TMPDIR": str(tmp_path)}
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a", env=env)
    until(lambda: any(tmp_path.glob(there)), process)
    ranks = _ranks(process, tmp_path)
    assert ranks or not there.endswith(".pid")
    process.send_signal(number)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == code, err.decode()
    assert "Error" not in err.decode()
    assert not psutil.wait_procs(ranks, timeout=LONG)[1], "none is alive"


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
def test_told_to_stop_while_a_class_is_created_a_run_is_not_failed(
    number: signal.Signals, code: int, status: str, ranks: str, stoker: Command, tmp_path: Path
) -> None:
    """Python 3.11 makes a RuntimeError of what a handler raises then."""
    done = stoker("train", RECIPE, f"told_in_class={int(number)}", "--nproc", ranks, "--name", "a")
    assert done.code == code, done.err
    assert "Error" not in done.err
    assert loaded(tmp_path / "runs" / "ranked" / "a").status == status


@pytest.mark.parametrize("told", [0, 1])
def test_a_rank_that_alone_is_told_to_stop_before_training_is_not_waited_for(
    told: int, stoker: Command, tmp_path: Path
) -> None:
    alone = (f"told_in_class={int(signal.SIGTERM)}", f"told_ranks=[{told}]")
    done = stoker("train", RECIPE, *alone, "--nproc", "2", "--name", "a")
    assert done.code == 75, done.err
    status = loaded(tmp_path / "runs" / "ranked" / "a").status
    assert status in {"preempted", "killed"}  # rank 0 may wait for the other in C code


def _wait_until_answered(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Wait until a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1:
        time.sleep(0.001)


@pytest.mark.parametrize(
    "arguments",
    [("-m", "stoker", "train", RECIPE, "--nproc", "2"), ("-c", "import stoker; stoker.main(print)")],
    ids=["command", "script"],
)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 130)],
    ids=["sigterm", "sigusr1", "sighup"],
)
def test_told_to_stop_before_anything_is_there_it_can_be_started_again(
    arguments: tuple[str, ...], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_LOADS_LONG)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    _wait_until_answered(process, number)
    process.send_signal(number)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == code
    assert err.decode() == "stoker: told to stop, and there was nothing to save\n"
    assert not (tmp_path / "runs").exists()


_LOADS_LONG = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            time.sleep(60)

sys.meta_path.insert(0, Slow())
"""


def test_a_scheduler_that_says_it_again_gets_the_same_exit_code(start: Start, tmp_path: Path) -> None:
    process = start("train", RECIPE, *SLOW, "steps=5000", "--name", "a")
    wait_for_points(process, tmp_path / "runs" / "ranked" / "a", 10)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 75


def test_ranks_end_with_their_launcher(start: Start, tmp_path: Path) -> None:
    process = start("train", RECIPE, *SLOW, "steps=5000", "--nproc", "2", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    wait_for_points(process, run, 10)
    ranks = _ranks(process)
    assert len(ranks) == 2
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=LONG)[1], "none is alive"
    assert loaded(run).status in ("killed", "failed")  # of a rank that has lost the other before it ended


def test_a_script_starts_ranks_of_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, RECIPE, "--nproc", "2", "--name", "a", "precision=fp32"],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ranked/a finished at step 60" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch_size=15", "--nproc", "2"], "nearest size that can is 14 or 16"),
        (["batch_size=1", "--nproc", "2"], "nearest size that can is 2"),
        (["backend=nccl", "--nproc", "2"], "this machine has no GPU"),
        (["sync_batchnorm=true"], "works on GPUs only"),
        (["fsdp.offload=true"], "no GPU to offload from"),
        (["parallel=single", "--nproc", "2"], "parallel=single runs one process"),
        (["parallel=fsdp", "fsdp.shard=3", "--nproc", "4"], "the 4 ranks evenly: use one of 1, 2, 4"),
        (["parallel=pipeline"], "parallel=pipeline needs at least two ranks"),
        (["parallel=pipeline", "pipeline.ranks=2", "--nproc", "3"], "does not divide the 3 ranks"),
        (["activation_checkpointing=half"], "give none, full, selective"),
        (["parallel=deepspeed", "deepspeed.config=nothing.json"], "nothing.json cannot be read"),
        (["parallel=deepspeed", "deepspeed.stage=2", "deepspeed.offload_parameters=true"], "needs stage 3"),
        (["--profile", "5"], "give the first and the last step"),
        (["parallel=dpp"], "did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_started(
    arguments: list[str], said: str, stoker: Command, tmp_path: Path
) -> None:
    done = stoker("train", RECIPE, *arguments, "--name", "a")
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_what_a_launcher_starts_while_another_process_trains_the_run_asks_for_another_try(
    start: Start, stoker: Command, tmp_path: Path
) -> None:
    same = ("train", RECIPE, *SLOW, "steps=30000", "--runs", str(tmp_path / "runs"), "--name", "a")
    process = start(*same)
    wait_for_points(process, tmp_path / "runs" / "ranked" / "a", 5)
    by_hand, launched = stoker(*same), stoker(*same, "--nproc", "2")
    process.kill()
    assert (by_hand.code, launched.code) == (2, 75), launched.err
    assert "another process is training" in launched.err
