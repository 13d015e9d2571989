"""What a search costs beside its trials: `stoker sweep` against Ray Tune and Optuna's processes.

python bench/sweep.py [--quick] [--json FILE]

A trial is 20 reports of a function that computes for a millisecond in all, in a module that imports torch;
two at a time, random values, nothing ends early. Trials a second are those between the first one's start and
the last one's end: what it takes to start a search is a row of its own. Ray and Optuna are at their best
documented settings for that: actors that are used again, and one process for all of a worker's trials; so is
ours, with --reuse-processes. What a process for each trial costs, which is the default, is a row of its own
too.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import psutil
from harness import Row

HERE = Path(__file__).resolve()
TRIALS, REPORTS, SECONDS = 100, 20, 0.001
RECIPE = """
from dataclasses import dataclass

import stoker
import torch

@dataclass(frozen=True)
class Config:
    x: float = 0.0

def train(run: stoker.Run, config: Config) -> None:
    for step in range(1, {reports} + 1):
        compute({each})
        run.log(val_loss=(config.x - 0.3) ** 2 + 1.0 / step)
"""


def compute(seconds: float) -> None:
    """What a trial does from one report to the next: so short a sleep would take more than twice as long."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def with_compute(code: str) -> str:
    """A module that has `compute`, and goes on so."""
    here = code.format(reports=REPORTS, each=SECONDS / REPORTS)
    return f"import time\n\n{inspect.getsource(compute)}\n{here}"


def timed(began: list[float], ended: list[float], count: int, whole: float) -> dict[str, float]:
    return {"rate": count / (max(ended) - min(began)), "whole": whole}


# -- a trial of a millisecond ------------------------------------------------------------------


def ours(
    trials: int, *, sampler: str = "random", reuse: bool = False, watch: bool = False
) -> dict[str, float]:
    Path("fast.py").write_text(with_compute(RECIPE), encoding="utf-8")
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stoker", "sweep", "fast.py", "x=uniform(0, 1)", "--trials", str(trials),
         "--parallel", "2", "--sampler", sampler, "--name", "fast",
         *(["--reuse-processes"] if reuse else [])],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    resident = _watched(process) if watch else float("nan")
    assert process.wait() == 0
    whole = time.perf_counter() - begun
    from stoker.tune import study

    found = study.read(Path("runs/fast/study.journal")).trials
    assert all(
        trial.state.name == "COMPLETE" and len(trial.intermediate_values) == REPORTS for trial in found
    )
    began = [trial.datetime_start.timestamp() for trial in found if trial.datetime_start]
    ended = [trial.datetime_complete.timestamp() for trial in found if trial.datetime_complete]
    return {**timed(began, ended, trials, whole), "grown": resident}


def _watched(process: subprocess.Popen[bytes]) -> float:
    """The memory of the controller at its end over that after 10 trials."""
    held, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            begun = sum(1 for _ in Path("runs/fast").glob("trial-*"))
            seen.append((begun, held.memory_info().rss))
        except (psutil.NoSuchProcess, FileNotFoundError):
            pass
        time.sleep(0.05)
    early = next((size for begun, size in seen if begun >= 10), seen[-1][1])
    return max(size for _, size in seen) / early


def ray_tune(trials: int) -> dict[str, float]:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    os.environ.update(RAY_AIR_NEW_OUTPUT="0", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_DEDUP_LOGS="0")
    import ray
    from ray import tune

    begun = time.perf_counter()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    class Fast(tune.Trainable):
        """As ours; a class, since actors are used again for those alone."""

        def setup(self, config: dict[str, Any]) -> None:
            import torch  # noqa: F401

            self.reset_config(config)

        def step(self) -> dict[str, Any]:
            compute(SECONDS / REPORTS)
            self.count += 1
            loss = (self.config["x"] - 0.3) ** 2 + 1.0 / self.count
            return {"val_loss": loss, "done": self.count == REPORTS}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config, self.count = new_config, 0
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    class Moments(tune.Callback):
        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_trial_start(self, *_: Any, **__: Any) -> None:
            self.began.append(time.time())

        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            self.ended.append(time.time())

    moments = Moments()
    tune.Tuner(
        Fast, param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="val_loss", mode="min", num_samples=trials, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=str(Path.cwd() / "ray"), verbose=0, callbacks=[moments],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()  # fmt: skip
    assert len(moments.ended) == trials
    return timed(moments.began, moments.ended, trials, time.perf_counter() - begun)


OPTUNA = """
import sys
import optuna, torch
from optuna.storages.journal import JournalFileBackend, JournalStorage
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(study_name="fast", sampler=optuna.samplers.RandomSampler(),
                          storage=JournalStorage(JournalFileBackend("fast.journal")))
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(1, {reports} + 1):
        compute({each})
        value = (x - 0.3) ** 2 + 1.0 / step
        trial.report(value, step)
    return value
study.optimize(objective, n_trials=int(sys.argv[1]))
"""


def optuna_processes(trials: int) -> dict[str, float]:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    begun = time.perf_counter()
    optuna.create_study(study_name="fast", storage=JournalStorage(JournalFileBackend("fast.journal")))
    code = with_compute(OPTUNA)
    workers = [subprocess.Popen([sys.executable, "-c", code, str(trials // 2)]) for _ in range(2)]
    assert all(worker.wait() == 0 for worker in workers)
    whole = time.perf_counter() - begun
    found = optuna.load_study(
        study_name="fast", storage=JournalStorage(JournalFileBackend("fast.journal"))
    ).trials
    began = [trial.datetime_start.timestamp() for trial in found if trial.datetime_start]
    ended = [trial.datetime_complete.timestamp() for trial in found if trial.datetime_complete]
    return timed(began, ended, len(found), whole)


# -- the controller alone ------------------------------------------------------------------------


def controller(trials: int) -> dict[str, float]:
    """Milliseconds of the controller a trial of 20 reports, the last 20 of so many; without processes."""
    from dataclasses import dataclass

    from stoker.tune import samplers, schedulers, space_reading, stores, study
    from stoker.tune.plan import Objective, Plan
    from stoker.tune.search import Executor, Search
    from stoker.tune.trial import Ended, Report

    @dataclass(frozen=True)
    class Config:
        lr: float = 1e-3
        width: int = 8
        dropout: float = 0.0
        kind: str = "a"

    class AtOnce(Executor):
        """In place of processes: a trial has reported and ended when it is started."""

        def __init__(self) -> None:
            self.moments: list[float] = []
            self._said: list[Any] = []

        @property
        def free(self) -> bool:
            return not self._said

        @property
        def running(self) -> list[Any]:
            return self._said

        def start(self, job: Any) -> None:
            self.moments.append(time.perf_counter())
            value = (job.values["lr"] - 0.01) ** 2 + job.values["dropout"]
            self._said = [Report(job.number, step, value + 1 / step) for step in range(1, REPORTS + 1)]
            self._said.append(Ended(job.number, "finished", logged=("val_loss",)))

        def wait(self, timeout: float | None) -> list[Any]:
            said, self._said = self._said, []
            return said

    searched = space_reading.parse(
        ["lr=log(1e-5, 1e-1)", "width=int(4, 64, log)", "dropout=uniform(0, 0.5)", "kind=[a, b, c]"], Config
    )
    folder = Path("runs/sweep")
    folder.mkdir(parents=True)
    file = stores.JournalFile(folder / "study.journal")
    made = study.opened(file, samplers.make("tpe", searched, 0), ["min"])
    workers = AtOnce()
    rule = schedulers.make("asha", least=1, most=100)
    plan = Plan(folder, "bench", Config, (Objective("val_loss", "min"),), trials, folder / "provenance")
    Search(plan, searched, made, file, rule, workers).run()
    moments = workers.moments[-20:]
    return {"ms": 1e3 * (moments[-1] - moments[0]) / (len(moments) - 1)}


def a_report(count: int) -> dict[str, float]:
    """Milliseconds that a report is on its way into the run's record, at the median of so many."""
    import stoker

    with stoker.Run("bench", "report") as run:
        spent = []
        for step in range(count):
            begun = time.perf_counter()
            run.log(val_loss=1.0 / (step + 1))
            spent.append(time.perf_counter() - begun)
    return {"ms": 1e3 * statistics.median(spent)}


# -- ASHA --------------------------------------------------------------------------------------------


def digits(trials: int, early: bool) -> dict[str, float]:
    rule = ["--scheduler", "asha-stop", "--least", "45", "--most", "405"] if early else []
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "stoker", "sweep", "image", "lr=log(1e-4, 3)", "weight_decay=log(1e-6, 1e-1)",
         "epochs=9", "batch_size=32", "precision=fp32", "eval_every=1ep", "--trials", str(trials),
         "--parallel", "2", "--sampler", "random", "--metric", "val_accuracy", "--name", "digits", "--json",
         *rule],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": time.perf_counter() - begun, "best": answer["best"]["value"]}


def table(run: Callable[..., Any], quick: bool) -> list[Row]:
    trials, pairs = (20, 1) if quick else (TRIALS, 9)
    rates: dict[str, list[dict[str, float]]] = {
        "ours": [], "a process each": [], "ray_tune": [], "optuna_processes": []
    }  # fmt: skip
    for _ in range(pairs):
        for who, found in rates.items():
            if who in ("ours", "a process each"):
                found.append(run("ours", trials=trials, reuse=who == "ours"))
            else:
                found.append(run(who, trials=trials))
    middle = {who: harness.median([one["rate"] for one in found]) for who, found in rates.items()}
    begun = {
        who: harness.median([one["whole"] - trials / one["rate"] for one in found])
        for who, found in rates.items()
    }
    mine, each = middle.pop("ours"), middle.pop("a process each")
    begun.pop("a process each")
    rows = [Row(f"{trials} trials of {REPORTS} reports, 2 at a time, a process each", "trials/s", each)]
    for peer, goal in (("ray_tune", 20.0), ("optuna_processes", 1.0)):
        ratios = [a["rate"] / b["rate"] for a, b in zip(rates["ours"], rates[peer], strict=True)]
        ratio = harness.median(ratios)
        rows.append(Row(
            f"{trials} trials of {REPORTS} reports, 2 at a time, over {peer}", "trials/s", mine,
            {peer: middle[peer]}, ratio, harness.spread(ratios), f"≥ {goal:g}×", ratio >= goal,
        ))  # fmt: skip
    first = begun.pop("ours")
    rows.append(Row("until the first trial is started, and after the last", "s", first, begun))
    many = run("ours", trials=30 if quick else 200, sampler="tpe", watch=True)
    rows.append(Row(
        "memory of the controller at the end of 200 trials over after 10", "×", many["grown"],
        ratio=many["grown"], goal="≤ 1.1×", met=many["grown"] <= 1.1,
    ))  # fmt: skip
    own = run("controller", trials=30 if quick else 200)["ms"]
    rows.append(Row("the controller, a trial at 200, TPE, ASHA", "ms", own, goal="< 20 ms", met=own < 20))
    record = run("a_report", count=2000)["ms"]
    rows.append(Row("the record of a report", "ms", record, goal="< 1 ms", met=record < 1))
    count = 6 if quick else 60
    whole, short = (run("digits", trials=count, early=early) for early in (False, True))
    ratio = short["seconds"] / whole["seconds"]
    rows.append(Row(
        f"{count} trainings of digits: time with ASHA over without", "s", short["seconds"],
        {"without": whole["seconds"]}, ratio, goal="≤ 0.4×", met=ratio <= 0.4,
    ))  # fmt: skip
    rows.append(Row("their best accuracy", "", short["best"], {"without": whole["best"]}))
    return rows


MEASURES = {
    "ours": ours, "ray_tune": ray_tune, "optuna_processes": optuna_processes, "controller": controller,
    "a_report": a_report, "digits": digits,
}  # fmt: skip


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    os.environ.setdefault("STOKER_SINKS", "none")

    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:

        def run(what: str, **options: Any) -> Any:
            print(what, options, file=sys.stderr)
            return harness.measure(HERE, what, within=Path(folder), **options)

        rows = table(run, asked.quick)
    harness.report(rows, asked.json)


if __name__ == "__main__":
    if not harness.answer_measure(MEASURES):
        main()
