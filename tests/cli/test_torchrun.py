"""Ranks that torchrun starts: nobody of ours watches over them."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from test_launch import RECIPE, slow_until

from commands import Start
from servers import free_port
from support import LONG, loaded, wait_for_points


def _torchrun(start: Start, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `torchrun ARGUMENTS` in a folder, forked as a command of ours would be."""
    launch = f"import sys; from torch.distributed import run; run.main({list(arguments)}); sys.exit()"
    return start(cwd=folder, first=launch)


def test_a_run_under_torchrun_is_preempted_with_its_loader_workers_and_goes_on(
    start: Start, tmp_path: Path
) -> None:
    """The workers hear the signal first, as where a scheduler sends it to every process of a job."""
    go = tmp_path / "go"
    asked = ("precision=fp32", "steps=40", "workers=1", "checkpoint_every=1000", *slow_until(go, 5))
    same = ("--standalone", "--nproc-per-node", "2", RECIPE, *asked, "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    process = _torchrun(start, tmp_path, *same)
    wait_for_points(process, run, 5)
    others = [p for p in psutil.Process(process.pid).children(recursive=True) if not _is_rank(p)]
    assert len(others) >= 2, "workers, and the servers that they come from"
    for other in others:
        other.send_signal(signal.SIGTERM)
    process.terminate()
    _, err = process.communicate(timeout=LONG)
    seen = loaded(run)
    assert seen.status == "preempted", err.decode()
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()
    assert not psutil.wait_procs(others, timeout=LONG)[1], "none is alive"

    go.touch()
    process = _torchrun(start, tmp_path, *same)  # the same command
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err.decode()
    after = loaded(run)
    assert after.attempts[-1].resumed_from == seen.step
    assert list(after.points["loss"].x) == list(range(1, 41))


def _torchrun_on_two(
    start: Start, folder: Path, *given: tuple[str, ...], runs: str = ""
) -> tuple[list[int], str]:
    """What torchrun does on two machines, each with its own copy of the script; exit codes and output."""
    port = str(free_port())
    launchers = []
    for number, arguments in enumerate(given):
        copy = folder / str(number)
        copy.mkdir(exist_ok=True)
        if not (copy / "ranked.py").exists():
            shutil.copy(RECIPE, copy)
        at = ("--nnodes=2", f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}")
        asked = ("precision=fp32", "steps=30", *arguments, "--name", "a", "--runs", runs or f"{folder}/runs")
        launchers.append(_torchrun(start, copy, *at, "ranked.py", *asked))
    said = [b"".join(launcher.communicate(timeout=LONG)).decode() for launcher in launchers]
    return [launcher.returncode for launcher in launchers], "".join(said)


def test_machines_that_share_no_folder_are_told_so(start: Start, tmp_path: Path) -> None:
    codes, said = _torchrun_on_two(start, tmp_path, (), (), runs="runs")
    assert 0 not in codes
    differs = (
        r"rank 0 on \S+ has opened .*/0/runs/ranked/a, which is not there on \S+: set --runs to a folder"
    )
    assert len(re.findall(f"stoker: error: {differs}", said)) == 2, said
    assert len(re.findall(r"exitcode +: 2 ", said)) == 2, said
    assert not (tmp_path / "0" / "runs" / "ranked").exists()


@pytest.mark.soak(small=False)
def test_machines_with_different_commands_are_refused_before_they_train(start: Start, tmp_path: Path) -> None:
    """As those of our launcher, in test_nodes.py, by the ranks themselves, as in the test above."""
    codes, said = _torchrun_on_two(start, tmp_path, ("batch_size=16",), ("batch_size=32", "dropout=0.2"))
    assert 0 not in codes
    differs = "batch_size is 32 here and 16 there, dropout is 0.2 here and 0.1 there; give the same command"
    assert len(re.findall(f"stoker: error: the config of rank 1 on .*{differs}", said)) == 2, said
    assert len(re.findall(r"exitcode +: 2 ", said)) == 2, said
    assert not (tmp_path / "runs" / "ranked").exists()


@pytest.mark.soak(small=False)
def test_machines_with_different_code_are_refused_also_when_they_go_on(start: Start, tmp_path: Path) -> None:
    """What may differ is where something is, and a file that nobody uses."""
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(["git", "init", "-q", folder], check=True)
        (folder / "unused.py").write_text(f"number = {number}")
    given = [("fail_rank=1", f"until={tmp_path / str(number) / 'file'}") for number in range(2)]
    codes, said = _torchrun_on_two(start, tmp_path, *given)
    assert 0 not in codes
    run = tmp_path / "runs" / "ranked" / "a"
    assert max(loaded(run).points["loss"].x) >= 19, said
    assert "rank 0 (there): until is " in (run / "logs" / "rank-1.log").read_text()

    scripts = [tmp_path / str(number) / "ranked.py" for number in range(2)]
    scripts[1].write_text(scripts[1].read_text().replace("raise RuntimeError(", "print("))
    codes, said = _torchrun_on_two(start, tmp_path, *given)
    assert 0 not in codes
    differs = "the code of rank 1 on .* differs from that of rank 0 on .*: ranked.py;"
    assert len(re.findall(differs, said)) == 2, said
    assert loaded(run).status == "failed"

    shutil.copy(scripts[1], scripts[0])
    codes, said = _torchrun_on_two(start, tmp_path, *given)
    assert codes == [0, 0], said
    assert (loaded(run).step, len(loaded(run).attempts)) == (30, 3)


def _is_rank(process: psutil.Process) -> bool:
    return RECIPE in process.cmdline()
