"""W&B keeps what it was given in memory for a while, and appends what it is given twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import wandb
from stoker import storage
from stoker.run import artifacts
from stoker.run.directory import SWEEP_LOCK, RunDirectory
from stoker.run.journal import Cursor
from stoker.tracking import feed, follower, ledger, sweep_follower, wandb_files, wandb_sink
from stoker.tracking.shipper import Shipper
from stoker.tracking.sink import SinkRun
from stoker.tracking.wandb_sink import WandbSink
from synthetic_run import DEADLINE, Trainer, make_run, until

import warm
from servers import WandbServer
from support import SOAK


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


@pytest.mark.soak
@pytest.mark.parametrize("whom", ["follower", "wandb"] if SOAK else ["wandb"])
@pytest.mark.parametrize("wait", [2.5, *([0.0] if SOAK else [])])
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


@pytest.mark.soak(small=False)
def test_trials_that_are_shipped_in_turns_arrive_whole_and_each_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "search"
    trainers = [Trainer(make_run(folder.parent, f"trial-{number}", folder.name)) for number in range(2)]
    lock = storage.try_lock(folder / SWEEP_LOCK)
    assert lock is not None
    for step in range(1, 5):
        for trainer in trainers:
            trainer.log(step, loss=step)
        if step == 1:
            shipping = sweep_follower.spawn(folder)
        for trainer in trainers:
            until(lambda: feed.reached(_shipped(trainer.directory), feed.end(trainer.directory.journal)))  # noqa: B023
    trainers[0].end("finished")
    trainers[1].die()
    os.close(lock)
    assert shipping.wait(DEADLINE) == 0
    for trainer, code in zip(trainers, (0, 1), strict=True):
        (file,) = wandb_files.of_run(trainer.directory.path, f"uid-of-{trainer.directory.id}")
        assert [row["loss"] for row in wandb_files.history(file) if "loss" in row] == [1, 2, 3, 4]
        assert _exits(file) == [code]


def _shipped(run: RunDirectory) -> Cursor:
    return ledger.load(ledger.file_of(run, "wandb")).cursor


def _exits(file: Path) -> list[int]:
    """The exit codes with which a run ended, as W&B has noted them."""
    kept = [record for record in wandb_files.records(file) if record.WhichOneof("record_type") == "exit"]
    return [record.exit.exit_code for record in kept]


def test_a_run_that_was_closed_is_opened_again_by_the_same_process_and_has_not_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    trainer = Trainer(run)
    trainer.log(1, loss=1)
    code = (
        "import sys; from pathlib import Path; from stoker.run.directory import RunDirectory\n"
        "from stoker.tracking import ledger; from stoker.tracking.shipper import Shipper\n"
        "from stoker.tracking.wandb_sink import WandbSink\n"
        "run = RunDirectory(Path(sys.argv[1]))\n"
        "for line in sys.stdin:\n"
        "    shipper = Shipper(run, ledger.file_of(run, 'wandb'), WandbSink)\n"
        "    while shipper.ship_next(): pass\n"
        "    shipper.close()\n"
        "    print('shipped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for step in (2, 3, 4):
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "shipped\n"
        trainer.log(step, loss=step)
    process.communicate()
    assert process.returncode == 0
    files = wandb_files.of_run(run.path, "uid-of-a")
    rows = [row for file in files for row in wandb_files.history(file)]
    assert [row["loss"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [_exits(file) for file in files] == [[], [], []]


def test_a_server_that_refused_gets_the_run_once_it_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WandbServer()
    server.refusal = 401
    for name, value in {"MODE": "online", "BASE_URL": server.url, "API_KEY": "0" * 40}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        run = make_run(tmp_path / "runs")
        trainer = Trainer(run)
        trainer.log(1, loss=1)
        shipping = follower.spawn(run)
        until(lambda: server.refused >= 3)
        until(lambda: follower.failing(run))
        assert "401" in follower.failing(run)["wandb"]
        until(lambda: wandb_files.of_run(run.path, "uid-of-a") == [])  # but for the attempt that is under way
        server.refusal = None
        until(lambda: follower.failing(run) == {} and _shipped(run).offsets)
        trainer.log(2, loss=2)
        trainer.end("finished")
        assert shipping.wait(DEADLINE) == 0
    finally:
        server.close()
    assert set(server.opened) == {"uid-of-a"}
    assert [row["loss"] for row in server.rows if "loss" in row] == [1, 2]
    assert server.exits == [0]


def test_what_wandb_refuses_is_renamed_or_left_out_and_the_rest_arrives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    trainer = Trainer(run)
    cells = [
        {"raw": b"\x00\xff", "took": timedelta(1), "about": {"x": 1}, "more": [{"y": 1}]},
        {"raw": b"", "took": None, "about": {"x": None}, "more": [{"y": None}]},
    ]
    trainer.table("cells", 1, cells)
    trainer.table("more/größe", 1, [{"a": 1}])
    files = artifacts.describe(run, artifacts.bring_in(run, Path(__file__), "größe"))
    kinds = {"größe": "größe x", "gräße": "job", "x" * 200: "wandb-own", "plain": "file"}
    for name, kind in kinds.items():
        trainer.journal.append("artifact", name=name, kind=kind, path="artifacts/größe", files=files)
    edges = {"edges": [0.0, 1.0, 2.0], "counts": [1]}  # one too few
    trainer.journal.append("media", kind="histogram", name="odd", step=1, file=None, about=edges)
    trainer.log(1, loss=1)
    trainer.end("finished")
    assert follower.spawn(run).wait(DEADLINE) == 0
    (file,) = wandb_files.of_run(run.path, "uid-of-a")
    shown = {key: value for row in wandb_files.history(file) for key, value in row.items()}
    assert shown["loss"] == 1
    assert shown["tables/more/größe"]["nrows"] == 1
    (table,) = file.parent.glob(f"files/{shown['tables/cells']['path']}")
    assert json.loads(table.read_text())["data"] == [
        ["b'\\x00\\xff'", "1 day, 0:00:00", '{"x":1}', '[{"y":1}]'],
        ["b''", None, '{"x":null}', '[{"y":null}]'],
    ]
    names = {record.artifact.name for record in wandb_files.records(file)}
    assert len({name for name in names if name.startswith("gr__e-")}) == 2
    assert any(name.startswith("xxx") for name in names)
    assert "plain-uid-of-a" in names
    said = (run.logs / "follower.log").read_text()
    assert said.count("W&B refuses histograms/odd of step 1, which is not shipped") == 1
    assert said.count("W&B refuses") == 1, said


@pytest.mark.soak(small=False)
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


def test_what_the_process_of_a_killed_follower_still_writes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "_WRITER_SECONDS", DEADLINE)
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


@pytest.mark.parametrize(
    ("setting", "mode"),
    [("disabled", "disabled"), ("dryrun", "offline"), ("Offline", "offline"), ("run", "online"),
     ("shared", "online"), ("", "online")],
)  # fmt: skip
def test_the_modes_of_wandb_are_its_own(setting: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", setting)
    assert wandb_sink.mode() == mode


def test_a_mode_that_wandb_login_or_its_command_has_kept_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_sink.mode() == "offline"


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_a_script_for_which_wandb_is_disabled_sends_and_writes_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    server = WandbServer()
    monkeypatch.delenv("WANDB_MODE")
    for key, content in {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, name: value}.items():
        monkeypatch.setenv(key, content)
    try:
        script = "import stoker\nwith stoker.Run('e', 'a') as run: run.log(loss=1.0)"
        ended = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert ended.stderr.count(f"{name}={value}: nothing goes to W&B") == 1
        assert not (tmp_path / "runs" / "e" / "a" / "wandb").exists()
        assert not (tmp_path / "runs" / "e" / "a" / "logs" / "follower.log").exists()
        assert server.opened == []
    finally:
        server.close()
