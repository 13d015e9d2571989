"""Faults of the disk, and of batches, on real runs."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stoker.checkpoint import manifest
from test_launch import RECIPE, SLOW, _weights, slow_until

from commands import Command, Start
from support import LONG, SOAK, loaded, slow_from, wait_for_points

KILLING = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MB at `runs`."""
    folder = tmp_path / "runs"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no right to mount a disk: {made.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_full_disk_ends_the_run_clearly_and_what_is_there_stays(
    nproc: str, small_disk: Path, stoker: Command, tmp_path: Path
) -> None:
    same = (
        "train", str(KILLING), "steps=24", "pause=0", "workers=0", "precision=fp32", "--nproc", nproc,
    )  # fmt: skip
    often = ("checkpoint_every=2", "keep_checkpoints=50", "--name", "a", "--experiment", "x")
    none = {"STOKER_SINKS": "none"}
    done = stoker(*same, *often, env=none)
    assert done.code == 1
    assert "the disk is full" in done.err
    assert "make room, then run the same command again" in done.err
    assert "Traceback" not in done.err
    run = small_disk / "x" / "a"
    kept = manifest.committed(run / "checkpoints")
    assert kept
    assert all(manifest.verify(path) for path in kept)
    assert len(loaded(run).points["loss"]) >= manifest.verify(kept[-1]).step
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    done = stoker(*same, *often, env=none)
    assert done.code == 0, done.err
    assert "from step" in done.err
    whole = stoker(*same, "--runs", str(tmp_path / "other"), "--name", "b", "--experiment", "x", env=none)
    assert whole.code == 0, whole.err
    assert _weights(run) == _weights(tmp_path / "other" / "x" / "b")
    assert list(loaded(run).points["loss"]) == list(range(1, 25))


@pytest.mark.soak
@pytest.mark.parametrize("nproc", ["1", "2"] if SOAK else ["2"])
def test_a_disk_that_fills_while_the_journal_is_written_ends_the_run_clearly(
    nproc: str, small_disk: Path, start: Start, stoker: Command, tmp_path: Path
) -> None:
    """Somebody else's file takes what is left: not a line that was written is lost, and it goes on."""
    same = (*SLOW, "checkpoint_every=1000", "--nproc", nproc)
    process = start("train", RECIPE, *same, "--name", "a", first=slow_from(30, pause=0.2))
    run = small_disk / "ranked" / "a"
    wait_for_points(process, run, 30)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1, err.decode()
    assert "the disk is full" in err.decode()
    before = dict(loaded(run).points["loss"].items())
    assert list(before) == list(range(1, len(before) + 1))
    assert 30 <= len(before) < 200
    filler.unlink()
    done = stoker("resume", "a", "pause=0")
    assert done.code == 0, done.err
    assert stoker("train", RECIPE, *same, "pause=0", "--name", "whole", "--runs", "other").code == 0
    whole = tmp_path / "other" / "ranked" / "whole"
    assert _weights(run) == _weights(whole)
    after = dict(loaded(run).points["loss"].items())
    assert after == dict(loaded(whole).points["loss"].items())
    assert before.items() <= after.items()


BAD = {
    "single": (1, ()),
    "fsdp": (2, ("parallel=fsdp",)),
    "zero-1": (2, ("parallel=deepspeed", "deepspeed.stage=1")),
    "zero-3": (2, ("parallel=deepspeed", "deepspeed.stage=3")),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", BAD if SOAK else ("single", "zero-3"))
def test_a_bad_batch_changes_nothing_under_any_strategy(name: str, stoker: Command, tmp_path: Path) -> None:
    """The last batch is bad: the weights are those of a run that is one step shorter."""
    size, settings = BAD[name]
    same = ("train", RECIPE, "precision=fp32", *settings, "dropout=0", "--nproc", str(size))
    done = stoker(*same, "steps=20", "nan_at=20", "on_bad_loss=skip", "--name", "bad")
    assert done.code == 0, done.err
    assert "step 20: the loss is nan; samples 304 to 319 are left out" in done.err
    assert stoker(*same, "steps=19", "--name", "good").code == 0
    runs = tmp_path / "runs" / "ranked"
    assert _weights(runs / "bad") == _weights(runs / "good")
    more = stoker(*same, "steps=25", "nan_at=20", "on_bad_loss=skip", "--name", "more")
    assert more.code == 0, more.err
    assert np.isfinite(loaded(runs / "more").points["loss"].y[20:]).all()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # MLflow's client runs in this process, with its own
def test_killed_at_random_nothing_is_lost(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(KILLING.parent))
    soak = importlib.import_module("soak")
    assert not soak.soak(
        tmp_path / "runs", lambda arguments, environment: start(*arguments, env=dict(environment)),
        kills=200 if SOAK else 2, nproc=2, seed=0 if SOAK else 5,  # by 5 the launcher, and then one rank
    )  # fmt: skip


_DIES = """
import os, signal, sys, threading
left, folder, process = [{moment}], {folder!r}, os.getpid()

def die(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"):
        return
    path, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if os.getpid() == process and writes and isinstance(path, str) and path.startswith(folder):
        left[0] -= 1
        if left[0] == 0:
            os.kill(process, signal.SIGKILL)

sys.addaudithook(die)
"""
"""Python that ends its process as it is about to write in a folder for the Nth time."""


@pytest.mark.soak
def test_killed_at_any_change_of_its_files_a_run_ends_in_the_same_bits(
    stoker: Command, tmp_path: Path
) -> None:
    same = (
        "train", str(KILLING), "steps=12", "pause=0", "workers=0", "precision=fp32", "checkpoint_every=4",
        "keep_checkpoints=2", "--experiment", "x",
    )  # fmt: skip
    runs = tmp_path / "runs" / "x"
    assert stoker(*same, "--name", "whole").code == 0
    for moment in itertools.count(1) if SOAK else (9, 17, 31):
        run = runs / f"killed-{moment}"
        killed = stoker(*same, "--name", run.name, first=_DIES.format(moment=moment, folder=str(run)))
        if killed.code == 0 and moment > 31:  # it has written everything
            break
        assert killed.code == -signal.SIGKILL, killed.err
        done = stoker(*same, "--name", run.name)
        assert done.code == 0, (moment, done.err)
        assert _sums(run) == _sums(runs / "whole"), moment
        assert loaded(run).points == loaded(runs / "whole").points, moment


def _sums(run: Path) -> dict[str, str]:
    """The checksums of the tensors in the last checkpoint."""
    return manifest.sums(manifest.committed(run / "checkpoints")[-1])


_STEPS = 60
_SHORT = (*SLOW, f"steps={_STEPS}")
_CUT = ("train", RECIPE, *_SHORT, *slow_until(Path("never"), 30), "--name", "a")


def _cut(start: Start, run: Path, first: str = "") -> None:
    """Train until some steps are done, then be preempted."""
    process = start(*_CUT, first=first)
    wait_for_points(process, run, 30)
    process.terminate()
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()


def test_a_run_that_is_moved_goes_on_where_it_is(start: Start, stoker: Command, tmp_path: Path) -> None:
    _cut(start, tmp_path / "runs" / "ranked" / "a")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    done = stoker("resume", "a", "pause=0", "--runs", "elsewhere")
    assert done.code == 0, done.err
    assert stoker("train", RECIPE, *_SHORT, "pause=0", "--name", "whole").code == 0
    run = tmp_path / "elsewhere" / "ranked" / "a"
    assert _weights(run) == _weights(tmp_path / "runs" / "ranked" / "whole")
    assert list(loaded(run).points["loss"]) == list(range(1, _STEPS + 1))


def test_a_run_that_is_moved_while_it_trains_says_so_and_goes_on_where_it_is(
    start: Start, stoker: Command, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "ranked" / "a"
    process = start(*_CUT)
    wait_for_points(process, run, 30)
    run.rename(run.with_name("b"))
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1, err.decode()
    assert f"{run} is gone: it was moved or deleted during training" in err.decode()
    assert "Traceback" not in err.decode()
    assert not run.exists()
    done = stoker("resume", "b", "pause=0")
    assert done.code == 0, done.err
    assert list(loaded(run.with_name("b")).points["loss"]) == list(range(1, _STEPS + 1))


def test_a_clock_that_is_set_back_changes_nothing(start: Start, stoker: Command, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "ranked" / "a"
    _cut(start, run, first="import time; now = time.time; time.time = lambda: now() + 86400")
    assert loaded(run).started > time.time() + 80000
    done = stoker(*_CUT, "pause=0.001")
    assert done.code == 2, "another pause is another config"
    done = stoker("resume", "a", "pause=0")
    assert done.code == 0, done.err
    assert list(loaded(run).points["loss"]) == list(range(1, _STEPS + 1))
    shown = stoker("runs", "show", "a")
    assert (shown.code, f"step        {_STEPS}/{_STEPS}" in shown.out) == (0, True), shown.out


def test_a_disk_that_may_only_be_read_is_said_at_once(small_disk: Path, stoker: Command) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = stoker("train", RECIPE, *SLOW, "--name", "a")
    assert done.code == 2
    assert "Read-only file system" in done.err


def test_a_run_on_a_disk_that_may_only_be_read_is_shown_and_not_gone_on_with(
    small_disk: Path, start: Start, stoker: Command
) -> None:
    run = small_disk / "ranked" / "a"
    _cut(start, run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for going_on in (("resume", "a"), _CUT):
        done = stoker(*going_on)
        assert done.code == 2, done.err
        assert "Read-only file system" in done.err
        assert "Traceback" not in done.err
    assert stoker("runs", "list", "--json").answer["runs"][0]["status"] == "preempted"
    assert stoker("runs", "show", "a").code == 0
    assert stoker("checkpoints", "verify", "a").code == 0
    assert stoker("report", "a", "--output", "report.html").code == 0
    removed = stoker("checkpoints", "rm", "a", "20")
    assert removed.code == 2
    assert "Read-only file system" in removed.err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert stoker("resume", "a", "pause=0").code == 0
    assert list(loaded(run).points["loss"]) == list(range(1, _STEPS + 1))
