"""`stoker train` and `resume` as real processes, killed with real signals."""

from __future__ import annotations

import csv
import io
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import warm
from support import LONG, SOAK, loaded, slow_from, until, wait_for_points

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"
PLATEAU = EXAMPLE.with_name("plateau.py")

# Slow enough to be hit in the middle, with randomness in the model, in the data and in the loop.
SLOW = """
import random, time
from dataclasses import dataclass
import numpy as np, stoker, torch
from torch import nn
from torch.nn.functional import mse_loss

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.01
    seed: int = 0
    pause: float = 0.01
    fail_at: int = 0

class Noisy(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x = torch.full((4,), i / 40) + 0.1 * torch.randn(4) + random.random() + float(np.random.rand())
        return x, x.sum()[None]

def train(run: stoker.Run, config: Config) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    trainer = stoker.Trainer(run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=config.lr),
        loss=lambda out, batch: (mse_loss(out, batch[1], reduction="sum"), len(out)),
        training=stoker.Training(checkpoint_every=7))
    for batch in trainer.steps(trainer.loader(Noisy(), batch_size=8), max_steps=60):
        run.log(loss=trainer.step(batch), noise=random.random() + float(np.random.rand()))
        time.sleep(config.pause)
        if run.step == config.fail_at:
            raise RuntimeError("as asked")

if __name__ == "__main__":
    stoker.main(train)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    return file


def test_the_example_runs_by_the_command_and_as_a_script(stoker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    by_command = stoker("train", str(EXAMPLE), "lr=0.003", "epochs=2", "--name", "a", "--json")
    assert by_command.code == 0, by_command.err
    script = subprocess.run(
        [sys.executable, str(EXAMPLE), "lr=0.003", "epochs=2", "--name", "b"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    runs = tmp_path / "runs" / "own_loop"
    assert loaded(runs / "a").points["loss"] == loaded(runs / "b").points["loss"]
    assert by_command.answer["status"] == "finished"
    assert by_command.answer["metrics"]["val_accuracy"] > 0.7
    assert "own_loop/b finished at step 47" in script.stdout
    weights = [(runs / name / "artifacts" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_the_example_differs_from_plain_pytorch_by_under_15_lines() -> None:
    ours = EXAMPLE.read_text().splitlines()
    plain = EXAMPLE.with_name("own_loop_plain.py").read_text().splitlines()
    assert len([line for line in ours if line not in plain]) < 15


def test_the_plain_twin_runs() -> None:
    process = warm.process(runpy.run_path, str(EXAMPLE.with_name("own_loop_plain.py")), None, "__main__")
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_example_with_a_scheduler_of_torchs_is_killed_and_goes_on(  # type: ignore[no-untyped-def]
    stoker, start, tmp_path: Path
) -> None:
    command = ("train", str(PLATEAU), "patience=0", "epochs=6", "lr=0.3", "checkpoint_every=40")
    assert stoker(*command, "--name", "whole").code == 0
    run = tmp_path / "runs" / "plateau" / "cut"
    process = start(*command, "--name", "cut", first=slow_from(100))
    wait_for_points(process, run, 100)
    process.kill()
    process.wait()
    done = stoker(*command, "--name", "cut")
    assert done.code == 0, done.err
    whole, cut = loaded(run.with_name("whole")), loaded(run)
    assert cut.points == whole.points
    assert cut.attempts[-1].resumed_from in (40, 80, 120)
    assert len(set(cut.points["lr"].values())) > 1


@pytest.mark.soak
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(  # type: ignore[no-untyped-def]
    stoker, start, slow: Path, tmp_path: Path
) -> None:
    kills = 40 if SOAK else 2
    assert stoker("train", str(slow), "--name", "whole").code == 0
    run = tmp_path / "runs" / "slow" / "cut"
    moments = [random.SystemRandom().uniform(-1, 30) for _ in range(kills)]
    for number, moment in enumerate(moments):
        command = ("resume", "cut") if number % 2 else ("train", str(slow), "--name", "cut")
        process = start(*command)
        if moment >= 0:
            wait_for_points(process, run, round(moment) + 1)
        else:  # before it has come to its first step
            while not run.exists() and process.poll() is None:
                time.sleep(0.005)
        process.kill()
        process.wait()
    done = stoker("train", str(slow), "--name", "cut")
    assert done.code == 0, done.err
    whole, cut = loaded(run.with_name("whole")), loaded(run)
    assert cut.points == whole.points, moments
    assert list(cut.points["loss"]) == list(range(1, 61))
    weights = [
        (path / "artifacts" / "model.safetensors").read_bytes() for path in (run, run.with_name("whole"))
    ]
    assert weights[0] == weights[1], moments


@pytest.mark.parametrize(
    ("sent", "code", "status"),
    [
        (signal.SIGTERM, 75, "preempted"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGHUP, 130, "interrupted"),
    ],
)
def test_told_to_stop_it_leaves_a_checkpoint_of_the_step_under_way(  # type: ignore[no-untyped-def]
    stoker, start, slow: Path, tmp_path: Path, sent: signal.Signals, code: int, status: str
) -> None:
    process = start("train", str(slow), "--name", "a", first=slow_from(10))
    run = tmp_path / "runs" / "slow" / "a"
    wait_for_points(process, run, 10)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=LONG)
    assert process.returncode == code
    seen = loaded(run)
    assert seen.status == status
    assert seen.checkpoints[-1] == seen.step
    assert b"next: stoker resume a" in out
    assert stoker("resume", "a").code == 0
    resumed = loaded(run)
    assert resumed.attempts[1].resumed_from == seen.step
    assert list(resumed.points["loss"]) == list(range(1, 61))


def test_how_to_find_a_run_is_said_whatever_the_usual_folder_is(  # type: ignore[no-untyped-def]
    stoker, slow: Path
) -> None:
    asked = ("train", str(slow), "pause=0", "--name", "a", "--runs", "ru[ns]")
    done = stoker(*asked, env={"STOKER_RUNS": "gs://bucket/runs"})
    assert done.code == 0, done.err
    assert "next: stoker runs show a --runs 'ru[ns]'" in done.out


def test_a_second_ctrl_c_stops_at_once(start, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = start("train", str(slow), "pause=30", "--name", "a")
    run = tmp_path / "runs" / "slow" / "a"
    wait_for_points(process, run, 1)
    process.send_signal(signal.SIGINT)
    until(lambda: b"press Ctrl-C again to stop at once" in process.err, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert b"stopped at once; the same command resumes from the newest checkpoint" in err
    assert loaded(run).status == "interrupted"


def test_a_finished_run_is_not_trained_again(stoker, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = ("train", str(slow), "pause=0", "--name", "a")
    assert stoker(*command).code == 0
    again = stoker(*command)
    assert again.code == 0
    assert "was already finished at step 60" in again.out
    assert len(loaded(tmp_path / "runs" / "slow" / "a").attempts) == 1


def test_another_config_under_the_same_name_is_refused_and_by_resume_it_is_drift(  # type: ignore[no-untyped-def]
    stoker, start, slow: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "slow" / "a"
    process = start("train", str(slow), "--name", "a", first=slow_from(10))
    wait_for_points(process, run, 10)
    process.kill()
    process.wait()
    refused = stoker("train", str(slow), "lr=0.5", "--name", "a")
    assert refused.code == 2
    assert "lr was 0.01 and is 0.5 now" in refused.err
    assert "stoker resume a lr=0.5" in refused.err
    resumed = stoker("resume", "a", "lr=0.5", "pause=0")
    assert resumed.code == 0, resumed.err
    assert "drift: lr was 0.01 and is 0.5 from now on" in resumed.err
    assert loaded(run).attempts[1].drift["lr"] == [0.01, 0.5]
    assert loaded(run).config["lr"] == 0.5


def test_a_run_under_way_is_not_trained_twice(stoker, start, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = start("train", str(slow), "pause=1", "--name", "a")
    wait_for_points(process, tmp_path / "runs" / "slow" / "a", 1)
    second = stoker("train", str(slow), "pause=1", "--name", "a")
    assert second.code == 2
    assert "another process is training" in second.err
    assert loaded(tmp_path / "runs" / "slow" / "a").status == "running"


def test_an_error_of_the_users_shows_its_traceback_and_fails_the_run(
    stoker, slow: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    done = stoker("train", str(slow), "pause=0", "fail_at=20", "--name", "a", "--json")
    assert done.code == 1
    assert 'raise RuntimeError("as asked")' in done.err
    assert done.answer == {"error": "RuntimeError: as asked", "bad_input": False, "exit_code": 1}
    seen = loaded(tmp_path / "runs" / "slow" / "a")
    assert seen.status == "failed"
    assert seen.attempts[0].error == "RuntimeError: as asked"


def test_a_damaged_checkpoint_is_passed_over_and_said(stoker, start, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "runs" / "slow" / "a"
    process = start("train", str(slow), "--name", "a", first=slow_from(25, pause=60))
    wait_for_points(process, run, 25)
    newest = run / "checkpoints" / "step-00000021"
    until((newest / "manifest.json").exists, process)
    process.kill()
    process.wait()
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = stoker("resume", "a")
    assert done.code == 0
    assert "skipped checkpoint step-00000021" in done.err
    assert "resumed a from step 14" in done.err
    assert list(loaded(run).points["loss"]) == list(range(1, 61))


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[int], Path]:
    """A file system of its own, of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system of its own")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_the_run_and_leaves_the_last_checkpoint(  # type: ignore[no-untyped-def]
    stoker, start, slow: Path, small_disk: Path
) -> None:
    runs = small_disk / "runs"
    process = start("train", str(slow), "--name", "a", "--runs", str(runs), first=slow_from(10))
    run = runs / "slow" / "a"
    until((run / "checkpoints" / "step-00000007" / "manifest.json").exists, process)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1
    assert "the disk is full" in err.decode()
    assert "step-00000007" in {p.name for p in (run / "checkpoints").iterdir()}
    filler.unlink()
    done = stoker("train", str(slow), "--name", "a", "--runs", str(runs))
    assert done.code == 0, done.err
    assert list(loaded(run).points["loss"]) == list(range(1, 61))


def test_workers_end_with_a_trainer_that_is_killed(start, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    slow.write_text(SLOW.replace("batch_size=8)", "batch_size=8, workers=2)"))
    process = start("train", str(slow), "pause=1", "--name", "a")
    wait_for_points(process, tmp_path / "runs" / "slow" / "a", 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the forkserver and two workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=LONG)
    assert not alive


def test_a_run_moved_elsewhere_resumes_there(stoker, start, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = start("train", str(slow), "--name", "a", first=slow_from(10))
    wait_for_points(process, tmp_path / "runs" / "slow" / "a", 10)
    process.kill()
    process.wait()
    moved = shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    assert stoker("resume", str(Path(moved) / "slow" / "a")).code == 0
    assert loaded(Path(moved) / "slow" / "a").status == "finished"


def test_the_exported_table_is_the_curve(stoker, slow: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert stoker("train", str(slow), "pause=0", "--name", "a").code == 0
    table = stoker("runs", "export", "a", "--format", "csv")
    assert table.code == 0, table.err
    rows = list(csv.DictReader(io.StringIO(table.out)))
    points = loaded(tmp_path / "runs" / "slow" / "a").points["loss"]
    assert {int(row["step"]): float(row["loss"]) for row in rows} == points


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "llmm"), "no recipe 'llmm'; did you mean 'llm'?"),
        (("train", "python-docs"), "python-docs is a config of the recipe llm: write llm --config"),
        (("train", "my.yaml"), "my.yaml is a config, not a recipe: write RECIPE --config my.yaml"),
        (("train", "missing.py"), "missing.py does not exist"),
        (("train", "no.such.module:train"), "cannot be imported"),
        (("train", "slow.py:nothing"), "has no function nothing(run, config)"),
        (("train", "slow.py", "lr=abc"), "lr=abc (command line)"),
        (("train", "slow.py", "lrr=1"), "did you mean 'lr'?"),
        (("train", "slow.py", "--name", "a/b"), "is not a valid folder name"),
        (("train", "slow.py", "--config", "none.yaml"), "config file none.yaml does not exist"),
        (("train", "slow.py", "--runs", "/dev/null/runs"), "cannot be written"),
        (("train", "slow.py", "--runs", "s3://a:b@bucket"), "leave credentials out of the URL"),
        (("train", "slow.py", "--lr", "0.2"), "No such option: --lr; write lr=0.2"),
        (
            ("train", "slow.py", "--fail-at=3"),
            "No such option: --fail-at; write fail_at=3",
        ),
        (("train", "slow.py", "--nam", "a"), "No such option: --nam (Possible options: "),
        (
            ("train", "slow.py", "--output_dir", "a"),
            "every run has its own folder: use the options --runs DIR",
        ),
        (
            ("train", "slow.py", "--n-trials", "4"),
            "No such option: --n-trials; use `stoker sweep`'s option --trials N",
        ),
        (("sweep", "slow.py", "--n-jobs", "4"), "No such option: --n-jobs; use --parallel N"),
        (("sweep", "slow.py", "--mode=max"), "No such option: --mode; use --goal min or --goal max"),
        (("train", "slow.py", "--verbose"), "No such option: --verbose"),
        (("resume", "nothing"), "no run 'nothing'"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_no_run(  # type: ignore[no-untyped-def]
    stoker, slow: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = stoker(*arguments)
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("ranks", [(), ("--nproc", "2")])
def test_a_traceback_begins_with_the_users_own_code(stoker, slow: Path, ranks: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    done = stoker("train", str(slow), "fail_at=3", "pause=0", "--name", "a", *ranks)
    assert done.code == 1
    first = done.err.partition("Traceback (most recent call last):\n")[2].splitlines()[0]
    assert first.strip().startswith(f'File "{slow}", line ')
    assert "RuntimeError: as asked" in done.err


def test_an_import_that_fails_is_shown_at_its_line(stoker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken.py").write_text("import stoker\nimport nowhere_to_be_found\n")
    done = stoker("train", "broken.py")
    assert done.code == 1
    assert done.err.splitlines()[1].strip() == f'File "{tmp_path / "broken.py"}", line 2, in <module>'
    assert len(done.err.splitlines()) == 5


def test_a_file_that_is_no_python_is_shown_at_its_line(stoker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken.py").write_text("deff train(): pass\n")
    done = stoker("train", "broken.py")
    assert done.code == 1
    assert done.err.splitlines()[0].strip() == f'File "{tmp_path / "broken.py"}", line 1'
    assert done.err.splitlines()[-1] == "stoker: error: SyntaxError: invalid syntax (broken.py, line 1)"


def test_an_error_in_a_worker_is_shown_once_and_ends_with_what_it_was(stoker, slow: Path) -> None:  # type: ignore[no-untyped-def]
    broken = SLOW.replace(
        "        x = torch", '        if i == 7: raise ValueError("bad sample")\n        x = torch'
    )
    slow.write_text(broken.replace("batch_size=8)", "batch_size=8, workers=1)"))
    done = stoker("train", str(slow), "pause=0")
    assert done.code == 1
    assert done.err.count("Original Traceback") == 1
    assert done.err.splitlines()[-1] == "stoker: error: ValueError: bad sample"


UNUSED = """
import stoker
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


def train(run, config: stoker.Training) -> None:
    trainer = stoker.Trainer(
        run, Model(), training=config, optimizer=torch.optim.Adam, loss=lambda o, b: (o.sum(), len(o))
    )
    for batch in trainer.steps(trainer.loader(torch.ones(8, 2), batch_size=4), max_steps=3):
        run.log(loss=trainer.step(batch))
"""


def test_parameters_without_part_in_the_loss_are_named_with_the_key_that_lets_them_be(  # type: ignore[no-untyped-def]
    stoker, tmp_path: Path
) -> None:
    (tmp_path / "unused.py").write_text(UNUSED)
    done = stoker("train", "unused.py", "--nproc", "2", "--name", "a")
    assert done.code == 1
    said = "stoker: error: parameters (spare.weight, spare.bias) did not contribute to the loss"
    assert said in done.err
    assert "add ddp.find_unused_parameters=true" in done.err
    assert "Traceback" not in done.err
    again = stoker("train", "unused.py", "--nproc", "2", "--name", "b", "ddp.find_unused_parameters=true")
    assert again.code == 0, again.err


CONFIG = """
from dataclasses import dataclass

import stoker


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    lr: float = 0.1


"""


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("def train(config: Config): pass", "train(config): the first parameter must be the run: write "
         "def train(run, config: Config)"),
        ("def train(c: Config, run): pass", "train(c, run): the first parameter must be the run"),
        ("def train(config): pass", "write def train(run, config: Config)"),
        ("def train(): pass", "train(): the first parameter must be the run"),
        ("@dataclass\nclass Own(Config): pass", "line 12: a dataclass that inherits from a frozen one, "
         "such as stoker.Training, must be frozen too: decorate it "
         "with @dataclass(frozen=True, kw_only=True)"),
    ],
)  # fmt: skip
def test_a_script_that_is_written_otherwise_than_it_is_called_is_told_how(  # type: ignore[no-untyped-def]
    stoker, tmp_path: Path, written: str, said: str
) -> None:
    (tmp_path / "own.py").write_text(CONFIG + written)
    done = stoker("train", "own.py")
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


def test_a_script_of_any_name_has_an_experiment_and_one_that_is_given_is_kept_or_refused(  # type: ignore[no-untyped-def]
    stoker, slow: Path, tmp_path: Path
) -> None:
    slow.rename(tmp_path / "train ít.py")
    done = stoker("train", "train ít.py", "pause=0", "--name", "a", "--nproc", "2")
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "train-it" / "a" / "run.json").is_file()
    refused = stoker("train", "train ít.py", "--experiment", "train ít")
    assert refused.code == 2
    assert "experiment 'train ít' is not a valid folder name" in refused.err
