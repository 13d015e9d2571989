"""Ranks that torchrun starts: nobody of ours watches over them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
from test_launch import RECIPE, slow_until

from support import LONG, loaded, wait_for_points


def _torchrun(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", RECIPE)
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments, "--name", "a"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
    )  # fmt: skip


def test_a_run_under_torchrun_is_preempted_with_its_loader_workers_and_goes_on(tmp_path: Path) -> None:
    """The workers hear the signal first, as where a scheduler sends it to every process of a job."""
    go = tmp_path / "go"
    same = ("precision=fp32", "steps=40", "workers=1", "checkpoint_every=1000", *slow_until(go, 5))
    run = tmp_path / "runs" / "ranked" / "a"
    process = _torchrun(tmp_path, *same)
    wait_for_points(process, run, 5)
    others = [p for p in psutil.Process(process.pid).children(recursive=True) if not _is_rank(p)]
    assert len(others) >= 2, "workers, and the servers that they come from"
    for other in others:
        other.send_signal(signal.SIGTERM)
    process.terminate()
    out, _ = process.communicate(timeout=LONG)
    seen = loaded(run)
    assert seen.status == "preempted", out.decode()
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()
    assert not psutil.wait_procs(others, timeout=LONG)[1], "none is alive"

    go.touch()
    process = _torchrun(tmp_path, *same)  # the same command
    out, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, out.decode()
    after = loaded(run)
    assert after.attempts[-1].resumed_from == seen.step
    assert list(after.points["loss"].x) == list(range(1, 41))


def _is_rank(process: psutil.Process) -> bool:
    return RECIPE in process.cmdline()
