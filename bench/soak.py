"""Kill a training at random, again and again; what it comes to must not tell.

python bench/soak.py [--kills 200] [--seed 0] [--nproc 2]

A small network is trained once undisturbed, and once while ranks, all of them, or the launcher too
are killed with SIGKILL at random moments: within steps, while shards, manifests and lines of the
journal are written, while ranks come up. Then the weights must be the same bytes, the journal must
hold each step once with the value it had, and so must MLflow. The seed decides who is killed and
after how long, so that a failure can be tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stoker

HERE = Path(__file__).resolve()
_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    """What is trained: a state of a few megabytes, so that a checkpoint takes as long as some steps."""

    batch_size: int = 16
    steps: int = 400
    pause: float = 0.01
    until: str = ""
    """It pauses no more once this file is there."""
    dropout: float = 0.1
    workers: int = 1
    seed: int = 0


def train(run: stoker.Run, config: Config) -> None:
    """A regression with dropout, in batches that a worker loads."""
    import torch
    from torch import nn
    from torch.nn.functional import mse_loss
    from torch.utils.data import TensorDataset

    made = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=made)
    torch.manual_seed(0)
    layers = [
        nn.Linear(8, _WIDTH),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(_WIDTH, _WIDTH),
        nn.ReLU(),
    ]
    trainer = stoker.Trainer(
        run, nn.Sequential(*layers, nn.Linear(_WIDTH, 1)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        loss=lambda output, batch: (mse_loss(output[:, 0], batch[1], reduction="sum"), len(batch[1])),
        training=config,
    )  # fmt: skip
    loader = trainer.loader(TensorDataset(x, x.sum(1)), batch_size=config.batch_size, workers=config.workers)
    for batch in trainer.steps(loader, max_steps=config.steps):
        run.log(loss=trainer.step(batch))
        if not (config.until and Path(config.until).exists()):
            time.sleep(config.pause)


Start = Callable[[Sequence[str], Mapping[str, str]], Any]
"""Starts `stoker ARGUMENTS` in an environment; returns what is as a Popen."""


def main() -> int:
    """0 where nothing was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, metavar="N")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stoker-soak-") as folder:
        output = Path(folder, "output.txt")

        def start(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
            with output.open("ab") as log:
                command = [sys.executable, "-m", "stoker", *arguments]
                return subprocess.Popen(command, env=dict(environment), stdout=log, stderr=log)

        try:
            problems = soak(
                Path(folder, "runs"), start, kills=given.kills, seed=given.seed, nproc=given.nproc
            )
        except RuntimeError:
            print(output.read_text()[-3000:], file=sys.stderr)
            raise
    for problem in problems:
        print(f"seed {given.seed}: {problem}")
    if not problems:
        print(f"{given.kills} kills of {given.nproc} ranks, seed {given.seed}: nothing was lost")
    return int(bool(problems))


def soak(runs: Path, start: Start, *, kills: int, seed: int, nproc: int) -> list[str]:
    """Train without and with kills, in a folder of runs; returns what tells the two apart, in words.

    Raises RuntimeError where a run ends as it should not.
    """
    steps = 20 * kills + 100
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOKER_SINKS": "mlflow"}

    def begin(name: str, *more: str) -> Any:
        arguments = [
            "train", str(HERE), f"steps={steps}", "precision=fp32", "checkpoint_every=7", "--nproc",
            str(nproc), "--name", name, "--experiment", "soak", "--runs", str(runs), "--max-restarts", "20",
            *more,
        ]  # fmt: skip
        return start(arguments, environment)

    if begin("whole", "pause=0").wait() != 0:
        raise RuntimeError("the undisturbed run failed")
    over = runs / "over"
    slow = ("pause=0.05", f"until={over}")  # it is not to end before the last kill
    _disturb(lambda: begin("killed", *slow), over, kills=kills, seed=seed, nproc=nproc)
    return _compare(runs, start(["sync", "soak/killed", "--runs", str(runs)], environment), steps)


def _disturb(begin: Callable[[], Any], over: Path, *, kills: int, seed: int, nproc: int) -> None:
    """Train, killing what the seed says when it says, until the run has come to its end.

    Args:
        over: a file that is there after the last kill.
    """
    drawn = random.Random(seed)
    process = begin()
    for number in range(1, kills + 1):
        whom = drawn.choice(["rank", "rank", "rank", "all", "launcher"])
        time.sleep(drawn.uniform(0.0, 1.0))
        ranks = _ranks(process, nproc)
        if whom == "launcher":
            process.kill()
        else:
            for rank in sorted(ranks) if whom == "all" else [drawn.randrange(nproc)]:
                with contextlib.suppress(ProcessLookupError, KeyError):
                    os.kill(ranks[rank], 9)
        if whom == "launcher":
            process.wait()
            process = begin()
        if process.poll() is not None:
            raise RuntimeError(f"seed {seed}: the launcher ended with {process.returncode} at kill {number}")
        print(f"kill {number} of {kills}: {whom}", flush=True)
    over.touch()
    if process.wait() != 0:
        raise RuntimeError(f"seed {seed}: ended with {process.returncode} after the last kill")


def _ranks(process: subprocess.Popen[bytes], count: int) -> dict[int, int]:
    """The process ids of a launcher's ranks, once all of them are there."""
    import psutil

    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):  # launches come and go meanwhile
            children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            files = Path(tempfile.gettempdir()).glob("stoker-launch-*/rank-*.pid")
            pids = [(int(file.stem.removeprefix("rank-")), int(file.read_text())) for file in files]
            found = {rank: pid for rank, pid in pids if pid in children}
            if len(found) == count:
                return found
        time.sleep(0.01)
    raise RuntimeError(f"no ranks within a minute, and the launcher ended with {process.poll()}")


def _compare(folder: Path, sync: Any, steps: int) -> list[str]:
    """What tells the run that was killed from the other one, in words."""
    from safetensors.numpy import load_file
    from stoker.run import view
    from stoker.run.directory import RunDirectory

    runs = [RunDirectory(folder / "soak" / name) for name in ("whole", "killed")]
    problems = []
    weights = [
        {n: t.tobytes() for n, t in load_file(r.artifacts / "model.safetensors").items()} for r in runs
    ]
    if weights[0] != weights[1]:
        problems.append("the weights differ")
    points: list[dict[int, Any]] = [dict(view.load(run).points["loss"]) for run in runs]
    if points[0] != points[1]:
        differing = [step for step in range(1, steps + 1) if points[0].get(step) != points[1].get(step)]
        problems.append(f"the journals differ at steps {differing[:10]}")
    if sync.wait() != 0:
        raise RuntimeError(f"stoker sync ended with {sync.returncode}")
    return problems + _compare_sinks(runs, steps)


def _compare_sinks(runs: Any, steps: int) -> list[str]:
    """Whether MLflow has one run of each, with each step once."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs[0].path.parent.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'soak'")
    found = client.search_runs([experiment.experiment_id])
    if len(found) != 2:
        return [f"MLflow has {len(found)} runs, not 2"]
    problems = []
    for run in found:
        history = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        if sorted(history) != list(range(1, steps + 1)):
            problems.append(
                f"MLflow has {len(history)} points of {run.info.run_name}, not {steps}, each once"
            )
    return problems


if __name__ == "__main__":
    sys.exit(main())
