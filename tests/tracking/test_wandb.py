"""W&B keeps what it was given in memory for a while, and appends what it is given twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import wandb
from stoker.run.directory import RunDirectory
from stoker.tracking import follower, ledger, wandb_files, wandb_sink
from stoker.tracking.shipper import Shipper
from stoker.tracking.sink import SinkRun
from stoker.tracking.wandb_sink import WandbSink
from synthetic_run import DEADLINE, Trainer, make_run

import warm


@pytest.fixture(autouse=True)
def offline(sinks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_SINKS", "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


def _ship_and_die(path: Path, wait: float, whom: str) -> None:
    """Ship a batch, and die, or lose W&B's own process, before the ledger can note it down."""
    directory = RunDirectory(path)

    class Dying(WandbSink):
        def open(self, known: str | None, started: float, mark: object, edition: str) -> SinkRun:
            opened = super().open(known, started, mark, edition)
            shipped = self.ship

            def ship(batch: object) -> None:
                shipped(batch)  # type: ignore[arg-type]
                time.sleep(wait)
                for child in psutil.Process().children(recursive=True):
                    if "wandb" in child.name():
                        child.kill()
                if whom == "follower":
                    os.kill(os.getpid(), signal.SIGKILL)

            self.ship = ship  # type: ignore[method-assign, assignment]
            return opened

    shipper = Shipper(directory, ledger.file_of(directory, "wandb"), Dying)
    shipper.ship_next()


@pytest.mark.parametrize("whom", ["follower", "wandb"])
@pytest.mark.parametrize("wait", [0.0, 2.5], ids=["in memory", "on disk"])
def test_a_batch_that_may_or_may_not_have_arrived_arrives_once(
    tmp_path: Path, wait: float, whom: str
) -> None:
    run = make_run(tmp_path / "runs")
    trainer = Trainer(run)
    for step in range(1, 101):
        trainer.log(step, loss=step, accuracy=step / 2)
    trainer.table("answers", 3, [{"a": 1}])
    process = warm.process(_ship_and_die, run.path, wait, whom)
    process.start()
    process.join(DEADLINE)
    for step in range(101, 121):
        trainer.log(step, loss=step, accuracy=step / 2)
    trainer.end("finished")
    assert follower.spawn(run).wait(DEADLINE) == 0

    files = wandb_files.of_run(run.path, "uid-of-a")
    assert len(files) <= 2  # one, where the first had not come to making it
    rows = [row for file in files for row in wandb_files.history(file)]
    seen = Counter(
        (key, row["step"]) for row in rows for key in row if key in ("loss", "accuracy", "tables/answers")
    )
    wanted = {(key, step) for key in ("loss", "accuracy") for step in range(1, 121)} | {("tables/answers", 3)}
    assert seen == Counter(wanted)
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == {s: s for s in range(1, 121)}


def test_metrics_whose_names_begin_with_an_underscore_arrive_once_and_with_their_values(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "runs")
    values = {"_priv": 1.0, "_step": 2.0, "_step_": 3.0, "_timestamp": 4.0, "_runtime": 5.0, "step": 6.0}
    for begin in (1, 4):
        trainer = Trainer(run)
        for step in range(begin, begin + 3):
            trainer.journal.append("metrics", step=step, values=values)
        trainer.end("finished")
        assert follower.spawn(run).wait(DEADLINE) == 0
    rows = [row for file in wandb_files.of_run(run.path, "uid-of-a") for row in wandb_files.history(file)]
    expected = {"_priv": 1, "_step_": 2, "_step__": 3, "_timestamp_": 4, "_runtime_": 5, "step_": 6}
    for name, value in expected.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        assert points == [(step, value) for step in range(1, 7)], name


def test_a_copy_has_a_run_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    copy = RunDirectory(run.path.with_name("b"))
    for step in (1, 2):
        for one in (run, copy) if copy.exists() else (run,):
            trainer = Trainer(one)
            trainer.log(step, loss=step)
            trainer.end("finished")
            assert follower.spawn(one).wait(DEADLINE) == 0
        if not copy.exists():
            shutil.copytree(run.path, copy.path)
    ids = [ledger.load(ledger.file_of(one, "wandb")).run for one in (run, copy)]
    assert ids[0] == "uid-of-a" != ids[1]
    for one, its in zip((run, copy), ids, strict=True):
        rows = [row for file in wandb_files.of_run(one.path, str(its)) for row in wandb_files.history(file)]
        assert [row["step"] for row in rows] == [1, 2]


def test_a_file_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    trainer = Trainer(run)
    for step in range(1, 2001):
        trainer.log(step, loss=step, text_of_some_length=step)
    trainer.end("finished")
    assert follower.spawn(run).wait(DEADLINE) == 0
    (file,) = wandb_files.of_run(run.path, "uid-of-a")
    whole = list(wandb_files.history(file))
    assert [row["loss"] for row in whole] == list(range(1, 2001))
    content = file.read_bytes()
    assert len(content) > 3 * 32 * 1024
    for cut in (3, 7, 9, 32 * 1024 - 2, 32 * 1024 + 3, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        rows = list(wandb_files.history(file))
        assert rows == whole[: len(rows)]


def test_what_the_process_of_a_killed_follower_still_writes_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "run-a.wandb"
    code = (
        "import sys, time; f = open(sys.argv[1], 'wb'); print(1, flush=True); time.sleep(1); f.write(b'last')"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    wandb_sink._wait_for_its_writer([file])
    assert file.read_bytes() == b"last"
    writer.communicate()


def test_a_key_that_wandb_login_has_kept_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(kept))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    kept.write_text("")
    assert (wandb_sink.key(), wandb_sink.mode()) == ("", "offline")
    for url in (wandb.Settings().base_url, "https://api.wandb.ai"):
        host = urlsplit(url).netloc
        kept.write_text(f"machine {host}\n  login user\n  password of-{host}\n")
        assert (wandb_sink.key(), wandb_sink.mode()) == (f"of-{host}", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example")
    assert wandb_sink.mode() == "offline"
