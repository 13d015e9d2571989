"""Which of several machines trains a run: leases in a shared folder, and in a store."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from stoker import storage
from stoker.errors import BadInput
from stoker.run import lease
from stoker.run.lease import Lease, LeasesInFolder

from support import LONG, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "EXPIRES", 0.5)
    monkeypatch.setattr(lease, "_LOOK", 0.05)


def _lease(folder: Path, machine: str) -> Lease:
    return Lease(LeasesInFolder(folder / lease.FOLDER), machine, folder, None)


@pytest.fixture
def lasting(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease expires here, however seldom its holder is run."""
    monkeypatch.setattr(lease, "EXPIRES", 60.0)


@pytest.mark.usefixtures("lasting")
def test_a_living_holder_is_not_robbed(tmp_path: Path) -> None:
    first = _lease(tmp_path, "one")
    first.take()
    first.keep(pytest.fail)
    with pytest.raises(BadInput, match="is training"):
        _lease(tmp_path, "two").take()
    first.release()
    _lease(tmp_path, "two").take()


@pytest.mark.usefixtures("lasting")
def test_a_scheduler_is_asked_to_try_again_what_another_process_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _lease(tmp_path, "one")
    first.take()
    first.keep(pytest.fail)
    with pytest.raises(lease.Busy) as by_hand:
        _lease(tmp_path, "two").take()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(lease.Busy, match="asks for another try") as in_job:
        _lease(tmp_path, "two").take()
    first.release()
    assert (by_hand.value.exit_code, by_hand.value.again) == (2, False)
    assert (in_job.value.exit_code, in_job.value.again) == (75, True)


def test_one_that_stands_unchanged_is_taken_whatever_its_clock_says(tmp_path: Path) -> None:
    _lease(tmp_path, "one").take()
    file = tmp_path / lease.FOLDER / "00000001"
    file.write_bytes(file.read_bytes().replace(b'"at":1', b'"at":9'))
    begun = time.monotonic()
    _lease(tmp_path, "two").take()
    assert time.monotonic() - begun >= 0.5
    assert [path.name for path in (tmp_path / lease.FOLDER).iterdir()] == ["00000002"]


def test_who_was_suspended_together_with_the_holder_looks_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an hour, as by a scheduler; this one is the first to go on."""
    first, clock, looks = _lease(tmp_path, "one"), [0.0], []
    first.take()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        clock[0] += 3600.0 if len(looks) == 1 else seconds
        if len(looks) == 3:
            first._beat += 1
            first._place.write(first._number, first._content(), new=False)

    of_both = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep, time=time.time)
    monkeypatch.setattr(lease, "time", of_both)
    with pytest.raises(lease.Busy, match="is training"):
        _lease(tmp_path, "two").take()
    assert len(looks) == 3


@pytest.mark.usefixtures("lasting")
def test_where_the_lock_holds_nobody_waits(tmp_path: Path) -> None:
    _lease(tmp_path, "one").take()
    _lease(tmp_path, "one").take()


def test_a_holder_that_slept_for_too_long_is_told(tmp_path: Path) -> None:
    first = _lease(tmp_path, "one")
    first.take()
    _lease(tmp_path, "two").take()
    told: list[str] = []
    heard = threading.Event()
    first.keep(lambda reason: (told.append(reason), heard.set()))
    assert heard.wait(LONG)
    assert "another process is training" in told[0]
    assert [path.name for path in (tmp_path / lease.FOLDER).iterdir()] == ["00000002"]


@pytest.mark.usefixtures("lasting")
def test_of_two_that_take_it_at_once_one_does(tmp_path: Path) -> None:
    taken, refused = [], []

    def take(machine: int) -> None:
        mine = _lease(tmp_path, str(machine))
        try:
            mine.take()
            mine.keep(pytest.fail)  # for one that comes later
            taken.append(mine)
        except BadInput:
            refused.append(mine)

    first = _lease(tmp_path, "gone")
    first.take()
    first.release()
    threads = [threading.Thread(target=take, args=(machine,)) for machine in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()


def test_a_disk_of_this_machine_needs_none(tmp_path: Path) -> None:
    assert not storage.is_shared(tmp_path / "runs" / "not" / "there")
    assert lease.of(tmp_path / "runs" / "x" / "a") is None


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """One folder as two machines see it: locks taken in one mount are not seen in the other."""
    (tmp_path / "disk").mkdir()
    mounts = (tmp_path / "one", tmp_path / "two")
    for mount in mounts:
        mount.mkdir()
        try:
            subprocess.run(["bindfs", tmp_path / "disk", mount], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no bindfs, or no right to mount: {error}")
    yield mounts
    for mount in mounts:
        subprocess.run(["umount", "-l", mount], check=False)


SCRIPT = """
import sys, time, stoker
with stoker.Run("x", "a", runs=sys.argv[1]) as run:
    for step in range(int(sys.argv[2])):
        run.log(loss=1.0)
        time.sleep(0.1)
"""


def test_two_machines_on_a_shared_folder_do_not_train_one_run(shared: tuple[Path, Path]) -> None:
    one, two = shared
    assert storage.is_shared(one)
    first = subprocess.Popen([sys.executable, "-c", SCRIPT, str(one), "100000"])
    try:
        while not list(two.glob("x/a/journal/*")):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(two), "3"], capture_output=True, text=True, check=False
        )
        assert second.returncode != 0
        assert f"process {first.pid} on" in second.stderr
        first.terminate()
    finally:
        first.kill()
        first.wait()


SLEEPER = """
import os, signal, sys, time, torch, stoker
from stoker.run import lease
lease.BEAT, lease.EXPIRES = 3600.0, 0.5  # whoever wakes has not looked yet
with stoker.Run("x", "a", runs=sys.argv[1]) as run:
    trainer = stoker.Trainer(
        run, torch.nn.Linear(2, 1), optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        inputs=lambda batch: (batch,), loss=lambda output, batch: (output.sum(), len(batch)),
        training=stoker.Training(checkpoint_every=1),
    )
    for batch in trainer.steps(trainer.loader(torch.zeros(8, 2), batch_size=2), max_steps=6):
        run.log(loss=trainer.step(batch))
        if run.step == int(sys.argv[2]):
            while not (run.directory.checkpoints / f"step-{run.step - 1:08d}" / "manifest.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), int(sys.argv[3]))
"""


def test_a_holder_that_was_stopped_for_too_long_makes_no_checkpoint_of_what_is_anothers(
    shared: tuple[Path, Path],
) -> None:
    one, two = shared
    command = [sys.executable, "-c", SLEEPER]
    first = subprocess.Popen([*command, str(one), "3", str(int(signal.SIGSTOP))], stderr=subprocess.PIPE)
    try:
        os.waitpid(first.pid, os.WUNTRACED)
        second = subprocess.run([*command, str(two), "5", str(int(signal.SIGKILL))], check=False)
        assert second.returncode == -signal.SIGKILL
        known = sorted(two.glob("x/a/checkpoints/*/manifest.json"))
        before = [(file, file.stat().st_mtime_ns) for file in known]
        assert known[-1].parent.name == "step-00000004"
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=LONG)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 1
    assert b"another process is training" in said
    assert [(f, f.stat().st_mtime_ns) for f in sorted(two.glob("x/a/checkpoints/*/manifest.json"))] == before


def test_a_lease_that_somebody_deleted_is_written_again(tmp_path: Path) -> None:
    first = _lease(tmp_path, "one")
    first.take()
    first.keep(pytest.fail)
    file = tmp_path / lease.FOLDER / "00000001"
    file.unlink()
    until(file.exists)
    first.release()


def test_of_two_leases_of_one_number_each_knows_its_own(tmp_path: Path) -> None:
    first, second = _lease(tmp_path, "one"), _lease(tmp_path, "two")
    first.take()
    (tmp_path / lease.FOLDER / "00000001").unlink()
    second.take()
    assert second.standing()
    assert not first.standing()


def test_one_that_was_cut_off_is_taken_after_a_while(tmp_path: Path) -> None:
    _lease(tmp_path, "one").take()
    (tmp_path / lease.FOLDER / "00000001").write_bytes(b"")
    begun = time.monotonic()
    _lease(tmp_path, "one").take()
    assert time.monotonic() - begun >= 0.5


def test_one_that_there_was_no_room_for_is_not_there(tmp_path: Path) -> None:
    _lease(tmp_path, "one").take()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match="too large"):
            _lease(tmp_path, "one").take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in (tmp_path / lease.FOLDER).iterdir()] == ["00000001"]
    _lease(tmp_path, "one").take()
