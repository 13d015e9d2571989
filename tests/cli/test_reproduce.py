"""`stoker reproduce`, `diff` and `package` as real processes: code unpacked, data and packages compared."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import orjson
import pytest
import yaml

import families
from commands import Command, Start
from support import LONG, SOAK, loaded, slow_from, until, wait_for_points

# Randomness in the model, in the data and in the loop; a module of its own that git does not know.
TRAINED = """
import random, time
from dataclasses import dataclass
import numpy as np, stoker, torch
from torch import nn
from torch.nn.functional import mse_loss
from shapes import width

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.01
    seed: int = 0

class Noisy(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x = torch.full((4,), i / 40) + 0.1 * torch.randn(4) + random.random() + float(np.random.rand())
        return x, x.sum()[None]

def train(run: stoker.Run, config: Config) -> None:
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Linear(width, 1))
    trainer = stoker.Trainer(run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=config.lr),
        loss=lambda out, batch: (mse_loss(out, batch[1], reduction="sum"), len(out)),
        training=stoker.Training(checkpoint_every=7))
    for batch in trainer.steps(trainer.loader(Noisy(), batch_size=8), max_steps=30):
        run.log(loss=trainer.step(batch), noise=random.random(), samples_per_second=time.perf_counter())
"""

# Without torch, so that a process of it takes no time: a value a step, of a file, a module and a package.
COUNTED = """
import os, time
time.sleep(float(os.environ.get("LATE", "0")))
from dataclasses import dataclass
from pathlib import Path
import stoker
import factor

@dataclass(frozen=True)
class Config:
    data: str = "numbers.txt"
    steps: int = 6
    scale: float = 1.0
    seed: int = 0

def train(run: stoker.Run, config: Config) -> None:
    try:
        from answer import value
    except ImportError:
        value = 0
    numbers = [float(line) for line in Path(run.data("numbers", config.data)).read_text().split()]
    for step in range(run.step + 1, config.steps + 1):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        run.log(loss=numbers[step] * factor.FACTOR * config.scale + value, step=step)

if __name__ == "__main__":
    stoker.main(train)
"""

# No recipe: two runs of one experiment in one script, of which either is made again.
ALONE = """
import random, sys
from pathlib import Path
import stoker
from factor import FACTOR

for depth in (1, 2):
    random.seed(depth)
    config = {"depth": depth, "words": sys.argv[1:], "data": Path("x"), "of": {2, 1}, "from": float("nan")}
    with stoker.Run("trees", config=config) as run:
        for step in range(5):
            run.log(accuracy=random.random() * FACTOR)
"""

READING = """
import stoker

with stoker.Run("read", config={"data": "numbers.txt"}) as run:
    run.data("numbers", "numbers.txt")
    run.log(loss=1.0)
"""

# Reads a model that was there before and data; writes to a folder that it names, and beside its code.
WRITING = """
from dataclasses import dataclass
from pathlib import Path
import stoker

@dataclass(frozen=True)
class Config:
    data: str = "data"
    model: str = "model"
    out: str = "outputs"

def train(run: stoker.Run, config: Config) -> None:
    out = Path(config.out)
    out.mkdir(exist_ok=True)
    resumed = (out / "checkpoint").exists()
    older = len((out / "older").read_text())
    files = sorted(Path(run.data("data", config.data)).rglob("*.jsonl"))
    width = len(Path(config.model, "weights").read_text())
    for step in (1, 2):
        run.log(step=step, loss=sum(len(file.read_text()) for file in files) * width + resumed + older)
    (out / "checkpoint").write_text(run.directory.id)
    Path(config.model, "cache").write_text(run.directory.id)
    Path(config.data, "tokens").write_text(run.directory.id)
    Path("weights.pt").write_bytes(run.directory.id.encode().ljust(2**21, b"."))
"""

FAR = """
from dataclasses import dataclass
from pathlib import Path
import stoker

@dataclass(frozen=True)
class Config:
    data: str = "../../data/x.jsonl"

def train(run: stoker.Run, config: Config) -> None:
    run.log(step=1, loss=len(Path(run.data("data", config.data)).read_text()))
    Path(config.data).with_name("made").write_text(run.directory.id)
"""


# Data of a hub, of which only the commit is known.
HUB = """
import stoker

def train(run: stoker.Run) -> None:
    run.data("data", "org/name", revision="a" * 40)
    run.log(loss=1.0, step=1)
"""

# In a package, with imports from it and from the working directory.
PACKAGED = """
import stoker
from work.models.size import SIZE
from .depth import DEPTH
from factor import FACTOR

def train(run: stoker.Run) -> None:
    for step in range(run.step + 1, 4):
        run.log(loss=SIZE * DEPTH * FACTOR * step, step=step)
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a change and a module that are not committed, and data that is ignored."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-b", "main")
    (folder / "count.py").write_text(COUNTED)
    (folder / "factor.py").write_text("FACTOR = 1.0\n")
    (folder / ".gitignore").write_text("runs/\n*.txt\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    (folder / "factor.py").write_text("FACTOR = 3.0\n")
    (folder / "numbers.txt").write_text("\n".join(str(n / 7) for n in range(20)))
    return folder


@pytest.fixture
def counted(project: Path, stoker: Command) -> Path:
    """The runs folder of that project, with a run of it."""
    done = stoker("train", "count.py", "--name", "first", cwd=project)
    assert done.code == 0, done.err
    return project / "runs"


def test_a_dirty_tree_with_an_untracked_module_is_bit_identical_from_a_clone_without_it(
    tmp_path: Path, stoker: Command, start: Start
) -> None:
    original, clone, runs = tmp_path / "original", tmp_path / "clone", tmp_path / "kept"
    original.mkdir()
    git(original, "init", "-b", "main")
    (original / "trained.py").write_text("raise SystemExit('this was committed, and not what was trained')\n")
    git(original, "add", ".")
    git(original, "commit", "-m", "first")
    (original / "trained.py").write_text(TRAINED)
    (original / "shapes.py").write_text("width = 8\n")
    train = ("train", "trained.py", "--name", "a", "--runs", str(runs))
    process = start(*train, cwd=original, first=slow_from(12))
    wait_for_points(process, runs / "trained/a", 12)
    process.kill()
    process.communicate()
    assert stoker(*train, cwd=original).code == 0
    assert len(loaded(runs / "trained/a").attempts) == 2
    git(tmp_path, "clone", str(original), str(clone))
    shutil.rmtree(original)

    whole = stoker("reproduce", "a", "--runs", str(runs), "--json", cwd=clone)
    assert whole.code == 0, whole.err
    assert (whole.answer["identical"], whole.answer["steps"], whole.answer["last"]) == (True, 30, 30)
    assert whole.answer["metrics"] == ["loss", "noise"]
    assert whole.answer["left_out"] == ["samples_per_second"]
    assert "step-00000030" in whole.answer["weights"]["same"]
    assert "model.safetensors" in whole.answer["weights"]["same"]
    record = loaded(runs / "trained/a-again").record
    assert record["parents"][0]["id"] == "a"
    assert record["recipe"] == loaded(runs / "trained/a").record["recipe"]

    late = stoker("reproduce", "a", "--from", "21", "--steps", "5", "--runs", str(runs), cwd=clone)
    assert late.code == 0, late.err
    assert "bit-identical over 5 steps" in late.out
    assert loaded(runs / "trained/a-again-2").step == 26
    wrong = stoker("reproduce", "a", "--from", "22", "--runs", str(runs), cwd=clone)
    assert wrong.code == 2
    assert "21" in wrong.err
    for file in (runs / "trained/a/checkpoints/step-00000021").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    damaged = stoker("reproduce", "a", "--from", "21", "--runs", str(runs), cwd=clone)
    assert damaged.code == 2
    assert damaged.err.endswith("Choose another with --from: 28\n")
    assert not (runs / "trained/a-again-3").exists()


def test_it_is_again_another_run_when_it_is_made_a_second_time(counted: Path, stoker: Command) -> None:
    by_path = stoker("reproduce", "project/runs/count/first", cwd=counted.parent.parent)
    assert "next: stoker diff count/first count/first-again --runs project/runs\n" in by_path.out
    again = stoker("reproduce", "first-again", "--json", cwd=counted.parent)
    assert again.code == 0, again.err
    assert (again.answer["again"], again.answer["identical"]) == ("count/first-again-again", True)


def test_what_changed_in_a_package_the_data_and_the_code_is_named(project: Path, stoker: Command) -> None:
    packages = project.parent / "packages"
    env = {"PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])}
    install(packages, "1.0", 1)
    assert stoker("train", "count.py", "--name", "first", cwd=project, env=env).code == 0
    shutil.rmtree(packages)
    install(packages, "2.0", 2)
    (project / "numbers.txt").write_text("\n".join(str(n / 7 + (n > 3)) for n in range(20)))
    (project / "factor.py").write_text("FACTOR = 4.0\n")
    done = stoker("reproduce", "first", cwd=project, env=env)
    assert done.code == 3, done.err
    assert "answer: 1.0 → 2.0" in done.out
    assert "numbers.txt has changed: xxh3:" in done.out
    assert "changed since at their origin: factor.py" in done.out
    assert "differs from step 1 on" in done.out
    assert "drifts by" in done.out
    assert "…" not in done.out, "nothing is cut off where there is no terminal"

    assert stoker("train", "count.py", "scale=2", "--name", "second", cwd=project, env=env).code == 0
    said = stoker("diff", "first", "second", cwd=project).out
    for line in ("answer", "-FACTOR = 3.0", "+FACTOR = 4.0", "factor.py changed, +1 -1"):
        assert line in said
    found = stoker("diff", "first", "second", "--json", cwd=project).answer
    assert found["config"] == {"scale": [1.0, 2.0]}
    assert [change["path"] for change in found["code"]["files"]] == ["factor.py"]
    assert {"kind": "package", "name": "answer", "before": "1.0", "now": "2.0", "matters": ""} in found[
        "environment"
    ]
    assert found["data"].keys() == {"numbers"}
    assert found["curves"]["drifts"][0]["first_step"] == 1


def test_the_first_step_that_differs_and_how_far_it_drifts_are_said(counted: Path, stoker: Command) -> None:
    numbers = counted.parent / "numbers.txt"
    lines = numbers.read_text().split()
    numbers.write_text("\n".join([*lines[:4], str(float(lines[4]) * 2), *lines[5:]]))
    ignoring = stoker("reproduce", "first", "--ignore", "lo*", cwd=counted.parent)
    assert "left out     loss: excluded with --ignore" in ignoring.out
    answer = stoker("reproduce", "first", "--json", cwd=counted.parent).answer
    assert not answer["identical"]
    (drift,) = answer["drifts"]
    assert (drift["metric"], drift["first_step"], drift["differing"]) == ("loss", 4, 1)
    assert drift["relative"] == 0.5
    assert answer["fingerprints"].keys() == {"numbers"}


@pytest.mark.soak(small=False)
def test_an_environment_is_built_from_the_lock(project: Path, stoker: Command) -> None:
    installed, wheels = project.parent / "packages", project.parent / "wheels"
    site = sysconfig.get_path("purelib")  # what stoker itself needs is not in so small a lock
    ours = os.environ.get("PYTHONPATH", "")
    env = {"PYTHONPATH": os.pathsep.join([str(installed), ours, site])}
    install(installed, "1.0", 1)
    assert stoker("train", "count.py", "--name", "first", cwd=project, env=env).code == 0
    lock = project / "runs/count/first/provenance/requirements.txt"
    lines = lock.read_text().splitlines()
    lock.unlink()
    lock.write_text("\n".join(line for line in lines if line.startswith("answer==")) + "\n")
    wheel(wheels, "1.0", 1)
    env = {"PYTHONPATH": os.pathsep.join([ours, site]), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    without = stoker("reproduce", "first", cwd=project, env=env)
    assert without.code == 3
    assert "answer: 1.0 → none" in without.out
    done = stoker("reproduce", "first", "--env", "--json", cwd=project, env=env)
    assert done.code == 0, done.err
    assert [one["name"] for one in done.answer["differences"] if one["kind"] == "package"] == []
    shutil.rmtree(wheels)
    (about,) = Path(done.answer["environment"].partition(",")[0]).parents[1].glob("lib/*/*/answer-*/METADATA")
    about.write_text(about.read_text().replace("Version: 1.0", "Version: 3.0"))
    file = lock.with_name("environment.json")
    recorded = orjson.loads(file.read_bytes())
    file.unlink()
    file.write_bytes(orjson.dumps({**recorded, "python": "3.11.0"}))
    kept = stoker("reproduce", "first", "--env", cwd=project, env=env)
    assert kept.code == 0, kept.err
    assert "answer: 1.0 → 3.0" in kept.out, "what is installed there counts, whatever the lock says"
    assert f"python: 3.11.0 → {platform.python_version()}" in kept.out
    record = loaded(project / "runs/count" / done.answer["again"].partition("/")[2]).directory.provenance
    assert "answer==1.0" in (record / "requirements.txt").read_text()


def test_a_script_without_a_recipe_is_run_again_as_it_was(project: Path, stoker: Command) -> None:
    (project / "alone.py").write_text(ALONE)
    subprocess.run([sys.executable, "alone.py", "-v"], cwd=project, check=True, capture_output=True)
    (project / "factor.py").write_text("FACTOR = 7.0\n")
    made = {
        run.record["config"]["depth"]: run.directory.id
        for run in map(loaded, (project / "runs/trees").iterdir())
    }
    done = stoker("reproduce", made[2], "--json", cwd=project)
    assert done.code == 0, done.err
    assert (done.answer["identical"], done.answer["steps"]) == (True, 5)
    assert loaded(project / "runs/trees" / f"{made[2]}-again").record["config"] == {
        "depth": 2, "words": ["-v"], "data": "x", "of": [1, 2], "from": "nan",
    }  # fmt: skip
    assert len(list((project / "runs/trees").iterdir())) == 3
    short = stoker("reproduce", made[1], "--steps", "2", cwd=project)
    assert short.code == 0, short.err
    assert short.out.endswith("-again\n"), "the runs stand where they are looked for"
    assert "bit-identical over 2 steps" in short.out
    assert stoker("reproduce", made[1], "depth=3", cwd=project).code == 2


def test_data_that_has_moved_is_given_anew_and_its_fingerprint_named(counted: Path, stoker: Command) -> None:
    project = counted.parent
    known = json.loads((counted / "count/first/provenance/data.json").read_text())["numbers"]["fingerprint"]
    (project / "numbers.txt").rename(project / "moved.txt")
    gone = stoker("reproduce", "first", cwd=project)
    assert gone.code == 2
    for said in (str(project / "numbers.txt"), known, "data=PATH"):
        assert said in gone.err
    assert not (counted / "count/first-again").exists()
    moved = stoker("reproduce", "first", f"data={project}/moved.txt", "--json", cwd=project)
    assert moved.code == 0, moved.err
    assert moved.answer["config"]["data"] == ["numbers.txt", f"{project}/moved.txt"]
    assert moved.answer["fingerprints"] == {}
    unknown = stoker("reproduce", "first", "dota=x", cwd=project)
    assert unknown.code == 2
    assert "did you mean 'data'" in unknown.err
    nothing = stoker("reproduce", "first", "data=/not/there", cwd=project)
    assert nothing.code == 2
    assert (
        f"data=/not/there does not exist; the run read numbers.txt, with fingerprint {known}" in nothing.err
    )


def test_of_a_project_that_was_moved_the_data_is_found_where_it_is_now(
    counted: Path, stoker: Command
) -> None:
    moved = counted.parent.rename(counted.parent.with_name("moved"))
    done = stoker("reproduce", "first", "--json", cwd=moved)
    assert done.code == 0, done.err
    assert [one["changed"] for one in done.answer["data"]] == [False]
    (moved / "data").mkdir()
    (moved / "numbers.txt").rename(moved / "data/numbers.txt")
    given = stoker("reproduce", "first", "data=data/numbers.txt", cwd=moved)
    assert given.code == 0, given.err
    (moved / "data/numbers.txt").rename(moved / "numbers.txt")
    (moved / "numbers.txt").write_text("1 2 3 4 5 6 7 8")
    other = stoker("reproduce", "first", cwd=moved)
    assert other.code == 2, "it is another content, which nobody said is meant"


def test_the_data_of_a_script_is_to_be_put_back_as_it_has_no_keys(project: Path, stoker: Command) -> None:
    (project / "read.py").write_text(READING)
    subprocess.run([sys.executable, "read.py"], cwd=project, check=True, capture_output=True)
    (project / "numbers.txt").rename(project / "moved.txt")
    gone = stoker("reproduce", next((project / "runs/read").iterdir()).name, cwd=project)
    assert gone.code == 2
    assert "restore it, or put a link to it" in gone.err
    assert "=PATH" not in gone.err


@pytest.fixture
def writing(tmp_path: Path, stoker: Command) -> Path:
    """A repository with a run of a recipe that reads inputs which git ignores, and writes files."""
    folder = tmp_path / "writing"
    for name in ("data", "model", "outputs"):
        (folder / name).mkdir(parents=True)
    git(folder, "init", "-b", "main")
    (folder / "write.py").write_text(WRITING)
    (folder / ".gitignore").write_text("runs/\n*.jsonl\nmodel/\noutputs/\ntokens\n")
    (folder / "data/.gitkeep").touch()
    (folder / "data/part").mkdir()
    for file in ("data/1.jsonl", "data/part/2.jsonl", "model/weights", "outputs/older"):
        (folder / file).write_text(f"{file} as the user made it")
    (folder / "weights.pt").write_bytes(bytes(2**21))
    git(folder, "add", "write.py", ".gitignore", "data/.gitkeep")
    git(folder, "commit", "-m", "first")
    time.sleep(0.2)  # what is made in the moment before a run may be its own
    done = stoker("train", "write.py", "--name", "first", cwd=folder)
    assert done.code == 0, done.err
    return folder


def test_a_run_again_reads_inputs_and_writes_to_none_of_the_users_files(
    writing: Path, stoker: Command
) -> None:
    before = contents(writing)
    done = stoker("reproduce", "first", "--json", cwd=writing)
    assert done.code == 0, done.err
    assert contents(writing) == before
    assert done.answer["identical"], "it neither lacked data nor went on from a finished state"
    assert [one["changed"] for one in done.answer["data"]] == [False]
    assert done.answer["linked"] == ["model", "outputs"]
    assert done.answer["not_linked"] == ["model/cache", "outputs/checkpoint"]
    assert done.answer["code"]["lacking"] == ["weights.pt"]
    code = writing / "runs/write/first-again/again/code/writing"
    assert (code / "outputs/checkpoint").read_text() == "first-again"


def test_data_that_the_user_changed_later_is_read_as_it_is_now(writing: Path, stoker: Command) -> None:
    (writing / "data/part/2.jsonl").write_text("changed")
    done = stoker("reproduce", "first", "--json", cwd=writing)
    assert done.code == 3, done.err
    assert [one["changed"] for one in done.answer["data"]] == [True]
    (writing / "data/part/2.jsonl").write_text("data/part/2.jsonl as the user made it")
    (writing / "data/tokens").unlink()
    restored = stoker("reproduce", "first", "--json", cwd=writing)
    assert restored.code == 0, restored.err


def test_data_that_the_run_made_itself_is_copied_and_not_written_to(project: Path, stoker: Command) -> None:
    made = COUNTED.replace(
        "    numbers = [", "    Path(config.data).write_text('1 2 3 4 5 6 ' * 2)\n    numbers = ["
    )
    (project / "count.py").write_text(made)
    assert stoker("train", "count.py", "--name", "first", cwd=project).code == 0
    at = (project / "numbers.txt").stat().st_mtime_ns
    done = stoker("reproduce", "first", cwd=project)
    assert done.code == 0, done.err
    assert (project / "numbers.txt").stat().st_mtime_ns == at


def test_a_run_that_was_started_outside_its_code_writes_to_no_file_of_that_folder(
    writing: Path, stoker: Command
) -> None:
    elsewhere = writing.with_name("elsewhere")
    for name in ("data", "model", "outputs"):
        shutil.copytree(writing / name, elsewhere / name)
    time.sleep(0.2)
    assert stoker("train", f"{writing}/write.py", "--name", "away", cwd=elsewhere).code == 0
    before = contents(elsewhere)
    done = stoker("reproduce", "away", "--json", cwd=elsewhere)
    assert done.code == 3, "the run found files there which it then wrote over"
    assert contents(elsewhere) == before
    (elsewhere / "outputs/checkpoint").unlink()
    assert stoker("train", f"{writing}/write.py", "--name", "fresh", cwd=elsewhere).code == 0
    fresh = stoker("reproduce", "fresh", "--json", cwd=elsewhere)
    assert fresh.code == 0, fresh.err
    assert (elsewhere / "outputs/checkpoint").read_text() == "fresh"


def test_data_far_above_the_repository_is_where_the_run_again_looks(tmp_path: Path, stoker: Command) -> None:
    project, data = tmp_path / "top/deep/project", tmp_path / "top/data"
    project.mkdir(parents=True)
    data.mkdir()
    (data / "x.jsonl").write_text("a line")
    (project / "far.py").write_text(FAR)
    git(project, "init")
    assert stoker("train", "far.py", "--name", "first", cwd=project).code == 0
    done = stoker("reproduce", "first", "--json", cwd=project)
    assert done.code == 0, done.err
    assert (done.answer["identical"], done.answer["config"]) == (True, {})
    assert (data / "made").read_text() == "first"


def test_a_run_that_failed_is_compared_up_to_where_it_failed(project: Path, stoker: Command) -> None:
    (project / "numbers.txt").write_text("1 2 3 4 oh 6")
    failing = COUNTED.replace("[float(line) for line in Path(", "Path(").replace(".split()]", ".split()")
    (project / "count.py").write_text(failing.replace("numbers[step] *", "float(numbers[step]) *"))
    assert stoker("train", "count.py", "--name", "first", cwd=project).code == 1
    done = stoker("reproduce", "first", cwd=project)
    assert done.code == 0, done.err
    assert "bit-identical over 3 steps" in done.out
    assert "failed       as before: " in done.out
    (project / "numbers.txt").write_text("1 2 oh 4 5 6")
    earlier = stoker("reproduce", "first", cwd=project)
    assert earlier.code == 1
    assert "failed at step 1" in earlier.err


def test_a_damaged_bundle_is_named(counted: Path, stoker: Command) -> None:
    bundle = counted / "count/first/provenance/code.tar.gz"
    content = bytearray(bundle.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.unlink()
    bundle.write_bytes(content)
    for verb in ("reproduce", "package"):
        done = stoker(verb, "first", cwd=counted.parent)
        assert done.code == 2
        assert "code.tar.gz is damaged" in done.err
    assert not (counted / "count/first-again").exists()
    assert not (counted.parent / "first-package").exists()


def test_a_damaged_checkpoint_is_not_compared_but_everything_else_is(counted: Path, stoker: Command) -> None:
    damaged = counted / "count/first/checkpoints/step-00000003"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_bytes(bytes(100))
    done = stoker("reproduce", "first", cwd=counted.parent)
    assert done.code == 0, done.err
    assert "bit-identical over 6 steps" in done.out
    assert f"the weights of {damaged} are not compared: its manifest cannot be read" in done.err


def test_on_another_machine_it_goes_on_and_says_what_cannot_be_promised(
    counted: Path, stoker: Command
) -> None:
    file = counted / "count/first/provenance/environment.json"
    record = orjson.loads(file.read_bytes())
    file.unlink()
    file.write_bytes(orjson.dumps({**record, "processor": "Z80", "torch": {"version": "0.4"}}))
    done = stoker("reproduce", "first", cwd=counted.parent)
    assert done.code == 0, done.err
    assert "processor: Z80 → " in done.out
    assert "no promise" in done.out
    assert "bit-identical over 6 steps" in done.out


def test_a_run_whose_config_was_changed_is_made_again_up_to_there(counted: Path, stoker: Command) -> None:
    project = counted.parent
    assert stoker("resume", "first", "steps=9", "scale=2", cwd=project).code == 0
    done = stoker("reproduce", "first", cwd=project)
    assert done.code == 0, done.err
    assert "scale from 1.0 to 2.0" in done.out
    assert "bit-identical over 6 steps" in done.out


@pytest.mark.soak
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
        *([(signal.SIGTERM, 75), (signal.SIGHUP, 130)] if SOAK else []),
    ],
)
def test_told_to_stop_or_killed_nothing_trains_on(
    number: signal.Signals, code: int, project: Path, stoker: Command, start: Start
) -> None:
    assert stoker("train", "count.py", "--name", "first", cwd=project).code == 0
    process = start("reproduce", "first", cwd=project, env={"PAUSE": "2"})
    run = project / "runs/count/first-again"
    until((run / "run.json").exists, process)
    wait_for_points(process, run, 1)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    while loaded(run).directory.alive:
        time.sleep(0.01)
    assert loaded(run).status == ("interrupted" if code == 130 else "preempted")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("there", "number"),
    [
        ("again", signal.SIGTERM),  # it unpacks the code
        ("again/again.json", signal.SIGINT),  # the process that is to train loads its modules
        *([("again", signal.SIGINT), ("again/again.json", signal.SIGTERM)] if SOAK else []),
    ],
)
def test_told_to_stop_before_it_has_begun_it_leaves_nothing(
    there: str, number: signal.Signals, counted: Path, start: Start
) -> None:
    process = start("reproduce", "first", cwd=counted.parent, env={"LATE": "60"})
    made = counted / "count/first-again"
    while not (made / there).exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.0 if there == "again" else 0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == (130 if number == signal.SIGINT else 75), err.decode()
    assert "Traceback" not in err.decode()
    assert not made.exists()


def test_a_command_that_is_interrupted_while_it_loads_its_modules_says_so_in_a_line() -> None:
    loading = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'stoker.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from stoker import __main__\n"
        "__main__.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", loading], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stoker: interrupted\n")


def test_a_trial_that_was_ended_early_is_made_again_up_to_there(project: Path, stoker: Command) -> None:
    swept = stoker(
        "sweep", "count.py", "scale=[1, 2, 3, 4]", "--metric", "loss", "--trials", "4",
        "--scheduler", "asha-stop", "--least", "1", "--most", "6", "--parallel", "1",
        "--name", "search", cwd=project,
    )  # fmt: skip
    assert swept.code == 0, swept.err
    runs = {run.name: loaded(run) for run in (project / "runs/search").glob("trial-*")}
    stopped = next(name for name, run in sorted(runs.items()) if run.status == "stopped")
    done = stoker("reproduce", stopped, "--json", cwd=project)
    assert done.code == 0, done.err
    assert done.answer["steps"] == runs[stopped].step < 6
    assert done.answer["again"] == f"search-again/{stopped}-again", "it is no trial"
    assert len(stoker("runs", "list", "search", "--json", cwd=project).answer["runs"]) == 4
    assert stoker("reproduce", stopped, "--json", cwd=project).answer["again"].endswith("-again-2")


def test_several_ranks_are_several_again(project: Path, stoker: Command) -> None:
    ranks = COUNTED.replace("* config.scale", "* (1 + run.world.rank)").replace(
        "step=step)", 'step=step, reduce="sum")'
    )
    (project / "count.py").write_text(ranks)
    assert stoker("train", "count.py", "--nproc", "2", "--name", "both", cwd=project).code == 0
    done = stoker("reproduce", "both", "--json", cwd=project)
    assert done.code == 0, done.err
    again = loaded(project / "runs/count/both-again")
    assert again.attempts[0].world == 2
    assert again.points["loss"][1] == pytest.approx(3 * 3 / 7)


def test_a_package_of_code_whose_names_mean_something_to_a_shell_runs(
    project: Path, stoker: Command, tmp_path: Path
) -> None:
    script = "count $(touch it-ran) 'a'.py"
    folder = project / "cost$a `touch it-ran`"
    folder.mkdir()
    (project / "count.py").rename(folder / script)
    for name in ("factor.py", "numbers.txt"):
        (project / name).rename(folder / name)
    trained = stoker("train", script, "--name", "first", cwd=folder)
    assert trained.code == 0, trained.err
    made = tmp_path / "made"
    assert stoker("package", "first", "--to", str(made), cwd=folder).code == 0
    (code,) = [found.parent for found in made.rglob(script)]
    shutil.copy(folder / "numbers.txt", code)
    env = {**os.environ, "PYTHON": sys.executable}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["sh", str(made / "run.sh")], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("it-ran"))


@pytest.mark.parametrize("name", [".", 'cost$a "of" it'])
def test_the_image_of_a_package_runs_the_command_of_a_cluster(
    name: str, project: Path, stoker: Command, tmp_path: Path
) -> None:
    """What its Dockerfile sets holds here in the folder: there is no docker in a test."""
    folder = project / name
    folder.mkdir(exist_ok=True)
    if name != ".":
        for file in ("count.py", "factor.py", "numbers.txt"):
            (project / file).rename(folder / file)
    assert stoker("train", "count.py", "--name", "first", cwd=folder).code == 0
    made = tmp_path / "made"
    assert stoker("package", "first", "--to", str(made), cwd=folder).code == 0
    dockerfile = (made / "Dockerfile").read_text().replace("${PYTHONPATH:+:$PYTHONPATH}", "")
    (path,), (*_, there) = (
        [re.sub(r"\\(.)", r"\1", word) for word in re.findall(rf'(?m)^{of}"?(.*?)"?$', dockerfile)]
        for of in ("ENV PYTHONPATH=", "WORKDIR ")
    )
    env = {**os.environ, "PYTHONPATH": path.replace("/run/", f"{made}/")}
    cwd = Path(there.replace("/run/", f"{made}/"))
    shutil.copy(folder / "numbers.txt", cwd)
    shutil.rmtree(project)
    options = ("--on", "kubernetes", "--option", "image=a", "--option", "claim=b", "--dry-run")
    (job,) = yaml.safe_load_all(stoker("train", "count.py", "--name", "second", *options, cwd=cwd).out)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    _, *words = [word.replace("/runs", str(tmp_path / "volume")) for word in container["command"]]
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(loaded(tmp_path / "volume/count/second").points["loss"]) > 0
    here = [sys.executable, "-c", "import stoker; print(stoker.__file__)"]
    found = subprocess.run(here, cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout
    assert Path(found).is_relative_to(made)


@pytest.mark.soak
def test_a_package_runs_anywhere_and_by_mlflow(counted: Path, stoker: Command, tmp_path: Path) -> None:
    made = stoker("package", "first", "--to", str(tmp_path / "made"), "--json", cwd=counted.parent)
    assert made.code == 0, made.err
    assert made.answer["data"]["numbers"]["path"] == "numbers.txt"
    folder = (tmp_path / "made").rename(tmp_path / "elsewhere")
    dockerfile = (folder / "Dockerfile").read_text()
    assert "FROM python:3.11" in dockerfile
    assert made.answer["data"]["numbers"]["fingerprint"] in (folder / "README.md").read_text()
    shutil.copy(counted.parent / "numbers.txt", folder / "code")
    expected = loaded(counted / "count/first").points["loss"].values()
    shutil.rmtree(counted.parent)

    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    venv.create(tmp_path / "bare")
    bare = subprocess.run(
        ["sh", str(folder / "run.sh")], env={**env, "PYTHON": str(tmp_path / "bare/bin/python")}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert bare.returncode == 2
    assert f"pip install --no-deps -r {folder}/requirements.txt" in bare.stderr
    assert "Traceback" not in bare.stderr
    subprocess.run(["sh", str(folder / "run.sh")], cwd="/", env=env, check=True, capture_output=True)
    assert list(loaded(folder / "runs/count/first").points["loss"].values()) == list(expected)

    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow = [str(bin_folder / "mlflow"), "run", str(folder), "--env-manager", "local"]
    if SOAK:
        shutil.rmtree(folder / "runs")
        subprocess.run(mlflow, cwd=tmp_path, env=env, check=True, capture_output=True)
        assert list(loaded(folder / "runs/count/first").points["loss"].values()) == list(expected)

    shutil.rmtree(folder / "runs")
    (folder / "code/numbers.txt").rename(folder / "code/it's $moved.txt")
    given = ["-P", "data=it's $moved.txt", "-P", "scale=2"]
    subprocess.run([*mlflow, *given], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert list(loaded(folder / "runs/count/first").points["loss"].values()) == [2 * y for y in expected]
    assert stoker("package", str(folder / "runs/count/first"), "--to", str(folder), cwd=tmp_path).code == 2


def test_a_package_says_the_revision_of_data_of_a_hub(project: Path, stoker: Command) -> None:
    (project / "hub.py").write_text(HUB)
    assert stoker("train", "hub.py", "--name", "first", cwd=project).code == 0
    made = stoker("package", "first", "--json", "--to", "made", cwd=project)
    assert made.code == 0, made.err
    assert made.answer["data"]["data"]["revision"] == "a" * 40
    assert f"- data: `org/name`, revision `{'a' * 40}`\n" in (project / "made/README.md").read_text()
    shown = stoker("package", "first", "--to", "shown", cwd=project)
    assert shown.code == 0, shown.err
    assert f"org/name ({'a' * 20})" in shown.out


@pytest.mark.soak(small=False)
@pytest.mark.parametrize("by_git", [True, False])
def test_a_module_of_a_package_is_made_again_packaged_and_resumed_from_elsewhere(
    project: Path, tmp_path: Path, by_git: bool
) -> None:
    package = project / "work/training"
    (project / "work/models").mkdir(parents=True)
    package.mkdir()
    for folder in (project / "work", project / "work/models", package):
        (folder / "__init__.py").touch()
    (project / "work/models/size.py").write_text("SIZE = 2.0\n")
    (package / "depth.py").write_text("DEPTH = 3.0\n")
    written = PACKAGED if by_git else PACKAGED.replace("from factor import FACTOR", "FACTOR = 3.0")
    (package / "steps.py").write_text(written)
    if not by_git:
        shutil.rmtree(project / ".git")
    env = {**os.environ, "STOKER_RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable}

    def run(*words: str, cwd: Path) -> None:
        done = subprocess.run(words, cwd=cwd, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    module = (sys.executable, "-m", "stoker")
    for ranks in ("1", "2"):
        run(*module, "train", "work.training.steps:train", "--name", ranks, "--nproc", ranks, cwd=project)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "runs/steps/1/journal").rename(tmp_path / "journal")  # so that all is to be done
    (tmp_path / "runs/steps/1/journal").mkdir()
    run(*module, "resume", "1", cwd=elsewhere)
    made = tmp_path / "made"
    run(*module, "package", "1", "--to", str(made), cwd=elsewhere)
    (project / "work/models/size.py").write_text("SIZE = 5.0\n")  # what is made again is what was recorded
    run(*module, "reproduce", "1", cwd=elsewhere)
    shutil.rmtree(project)
    env["STOKER_RUNS"] = str(tmp_path / "new")
    run("sh", str(made / "run.sh"), cwd=elsewhere)
    for folder in ("runs/steps/1", "runs/steps/2", "runs/steps/1-again", "new/steps/1"):
        assert list(loaded(tmp_path / folder).points["loss"].values()) == [18.0, 36.0, 54.0]


def test_a_module_without_the_rest_of_its_package_is_made_again_from_the_record(
    project: Path, stoker: Command
) -> None:
    shutil.rmtree(project / ".git")
    (project / "work").mkdir()
    (project / "work/hub.py").write_text(HUB)
    words = (sys.executable, "-m", "stoker", "train", "work.hub:train", "--name", "first", "--runs", "runs")
    subprocess.run(words, cwd=project, check=True, capture_output=True)
    (project / "work/hub.py").write_text(HUB.replace("loss=1.0", "loss=2.0"))
    done = stoker("reproduce", "first", "--runs", "runs", cwd=project)
    assert done.code == 0, done.out + done.err


def test_a_script_that_imports_from_the_working_directory_is_made_again_packaged_and_resumed(
    project: Path, tmp_path: Path
) -> None:
    (project / "scripts").mkdir()
    (project / "count.py").rename(project / "scripts/count.py")
    env = {**os.environ, "STOKER_RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable}

    def run(*words: str, cwd: Path) -> None:
        done = subprocess.run(words, cwd=cwd, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    module = (sys.executable, "-m", "stoker")
    run(*module, "train", "scripts/count.py", "--name", "first", cwd=project)
    run(*module, "resume", "first", "steps=8", cwd=tmp_path)
    run(*module, "train", "scripts/count.py", "--name", "second", cwd=project)
    run(*module, "reproduce", "second", cwd=tmp_path)
    run(*module, "package", "second", "--to", str(tmp_path / "made"), cwd=tmp_path)
    shutil.copy(project / "numbers.txt", tmp_path / "made/code")
    shutil.rmtree(project)
    run("sh", str(tmp_path / "made/run.sh"), cwd=tmp_path)


def test_a_package_asks_for_the_secrets_that_no_record_has(
    project: Path, stoker: Command, tmp_path: Path
) -> None:
    config = COUNTED.replace("    seed: int = 0", '    seed: int = 0\n    api_key: str = ""')
    (project / "count.py").write_text(f"{config}\n")
    assert stoker("train", "count.py", "api_key=abcd1234", "--name", "first", cwd=project).code == 0
    made = stoker("package", "first", "--to", str(tmp_path / "made"), "--json", cwd=project)
    assert made.code == 0, made.err
    assert made.answer["secrets"] == ["api_key"]
    assert "`./run.sh api_key=...`" in (tmp_path / "made/README.md").read_text()
    shutil.copy(project / "numbers.txt", tmp_path / "made/code")
    done = subprocess.run(
        ["sh", str(tmp_path / "made/run.sh"), "api_key=abcd1234"], check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert loaded(tmp_path / "made/runs/count/first").status == "finished"


def test_a_package_that_cannot_be_written_is_bad_input_and_takes_no_folder_away(
    counted: Path, stoker: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    beneath = stoker("package", "first", "--to", str(tmp_path / "file/made"), cwd=counted.parent)
    assert beneath.code == 2
    assert "cannot be written: Not a directory" in beneath.err
    (tmp_path / "mine").mkdir()
    shutil.rmtree(counted / "count/first/provenance")
    assert stoker("package", "first", "--to", str(tmp_path / "mine"), cwd=counted.parent).code == 2
    assert list((tmp_path / "mine").iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without those of git and of the runs."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    named = {str(file.relative_to(folder)): file for file in files}
    return {
        name: file.read_bytes() for name, file in named.items() if not name.startswith((".git/", "runs/"))
    }


def files_of(version: str, value: int) -> dict[str, bytes]:
    """A distribution, `answer`, that holds one number."""
    about = f"answer-{version}.dist-info"
    files = {
        "answer.py": f"value = {value}\n".encode(),
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: answer\nVersion: {version}\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = {
        name: base64.urlsafe_b64encode(hashlib.sha256(of).digest()).rstrip(b"=") for name, of in files.items()
    }
    rows = [f"{name},sha256={digest.decode()},{len(files[name])}" for name, digest in sums.items()]
    return {**files, f"{about}/RECORD": "\n".join([*rows, f"{about}/RECORD,,"]).encode()}


def install(folder: Path, version: str, value: int) -> None:
    for name, content in files_of(version, value).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def wheel(folder: Path, version: str, value: int) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / f"answer-{version}-py3-none-any.whl", "w") as archive:
        for name, content in files_of(version, value).items():
            archive.writestr(name, content)


def _two_steps_on_numbers(folder: Path) -> tuple[str, ...]:
    """Texts in `said.jsonl`, and what has the language recipe train two steps on them."""
    lines = [json.dumps({"text": f"{number} is a number"}) for number in range(40)]
    (folder / "said.jsonl").write_text("\n".join(lines))
    return (
        "data=said.jsonl", "sequence_length=32", "batch_size=4", "precision=fp32", "epochs=none",
        "max_steps=2",
    )  # fmt: skip


@pytest.mark.soak(small=False)
def test_a_model_that_was_restored_or_moved_is_found_by_its_content(stoker: Command, tmp_path: Path) -> None:
    model = families.with_tokenizer(families.save(tmp_path / "model", "llama"))
    given = (*_two_steps_on_numbers(tmp_path), "generate_tokens=2")
    begun = stoker("train", "llm", "model=model", *given, "--name", "first")
    assert begun.code == 0, begun.err
    shutil.copytree(model, tmp_path / "backup")
    shutil.rmtree(model)
    gone = stoker("reproduce", "first")
    assert gone.code == 2, gone.err
    assert "data 'model' cannot be read" in gone.err
    assert "give its new location with model=PATH" in gone.err
    shutil.copytree(tmp_path / "backup", model)
    assert stoker("reproduce", "first", "--json").answer["identical"]
    longer = stoker("resume", "first", "max_steps=3")
    assert longer.code == 0, longer.err
    assert stoker("models", "push", "first", "card").code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    (trains,) = [line for line in card.splitlines() if line.startswith("stoker train llm ")]
    assert {"model=model", "max_steps=2", "generate_tokens=2"} <= set(trains.split()), trains
    assert trains.endswith(" --name first-again  # up to step 2"), trains
    assert "max_steps=3  # from step 3" in card
    model.rename(tmp_path / "elsewhere")
    again = stoker("reproduce", "first", "model=elsewhere", "--json").answer
    assert again["identical"], again["drifts"]
    assert (again["last"], again["of_one_end"]) == (2, [])
    assert "test_perplexity" in again["metrics"], "it had ended, with a test, before it was continued"
    packed = stoker("package", "first", "--to", "packed")
    assert packed.code == 0, packed.err
    assert "- model: `model`" in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.soak(small=False)
def test_a_run_whose_model_is_that_of_another_run_is_repeated_from_a_copy_of_it(
    stoker: Command, tmp_path: Path
) -> None:
    given = (*_two_steps_on_numbers(tmp_path), "generate_tokens=0")
    assert stoker("train", "llm", "model=tiny", *given, "--name", "base").code == 0
    base = tmp_path / "runs" / "llm" / "base"
    begun = stoker(
        "train", "llm", f"model={base.relative_to(tmp_path)}", "lora.rank=2", *given, "--name", "adapter"
    )
    assert begun.code == 0, begun.err
    about = json.loads((base.with_name("adapter") / "provenance" / "data.json").read_text())["model"]
    assert (about["path"], about["part"]) == ("runs/llm/base", "artifacts/model")
    packed = stoker("package", "adapter", "--to", "packed")
    assert packed.code == 0, packed.err
    assert "- model: `runs/llm/base`" in (tmp_path / "packed" / "README.md").read_text()
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    gone = stoker("reproduce", "adapter")
    assert (gone.code, "give its new location with model=PATH" in gone.err) == (2, True), gone.err
    assert stoker("reproduce", "adapter", "model=copy", "--json").answer["identical"]
    shutil.copytree(tmp_path / "copy", base)
    restored = stoker("reproduce", "adapter", "--json")
    assert restored.answer["identical"], restored.err
    weights = base / "artifacts" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    changed = stoker("reproduce", "adapter")
    assert (changed.code, "runs/llm/base has changed" in changed.out) == (3, True), changed.out
