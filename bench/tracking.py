"""What tracking costs: a call, a loop, a kill, a backlog, a fold; ours and the peers in turn.

python bench/tracking.py [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import Row, median, spread

HERE = Path(__file__).resolve()
FIVE = ("loss", "accuracy", "lr", "gradient_norm", "tokens_per_second")
Log = Callable[[int, dict[str, float]], None]


# -- loggers: each yields a function that logs five scalars at a step --------------------------


@contextlib.contextmanager
def stoker_logger() -> Iterator[Log]:
    import stoker

    with stoker.Run("bench", runs="runs") as run:
        yield lambda step, values: run.log(values, step=step)


@contextlib.contextmanager
def wandb_logger() -> Iterator[Log]:
    import wandb

    run = wandb.init(project="bench", mode="offline", settings=wandb.Settings(silent=True))
    yield lambda step, values: run.log(values, step=step)
    run.finish()


@contextlib.contextmanager
def tensorboard_logger() -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter("tensorboard")

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    yield log
    writer.close()


def _mlflow(synchronous: bool) -> Iterator[Log]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
    mlflow.set_tracking_uri(f"sqlite:///{Path.cwd()}/mlflow.db")
    with mlflow.start_run():
        yield lambda step, values: mlflow.log_metrics(values, step=step, synchronous=synchronous)


@contextlib.contextmanager
def mlflow_logger() -> Iterator[Log]:
    yield from _mlflow(True)


@contextlib.contextmanager
def mlflow_async_logger() -> Iterator[Log]:
    yield from _mlflow(False)


@contextlib.contextmanager
def no_logger() -> Iterator[Log]:
    yield lambda step, values: None


LOGGERS: dict[str, Callable[[], contextlib.AbstractContextManager[Log]]] = {
    "nothing": no_logger,
    "stoker": stoker_logger,
    "wandb": wandb_logger,
    "tensorboard": tensorboard_logger,
    "mlflow": mlflow_logger,
    "mlflow_async": mlflow_async_logger,
}


def _values(step: int) -> dict[str, float]:
    return {name: 1.0 / (step + index + 1) for index, name in enumerate(FIVE)}


# -- measures, each in a process of its own ----------------------------------------------------


def call(logger: str, calls: int) -> dict[str, float]:
    """Microseconds of one log call of five scalars: median and 99th percentile."""
    times = []
    with LOGGERS[logger]() as log:
        log(0, _values(0))  # whatever is started with the first call
        for step in range(1, calls + 1):
            values = _values(step)
            began = time.perf_counter_ns()
            log(step, values)
            times.append(time.perf_counter_ns() - began)
    times.sort()
    return {"median": times[len(times) // 2] / 1e3, "p99": times[int(len(times) * 0.99)] / 1e3}


def loop(logger: str, seconds: float) -> float:
    """Steps a second of a loop with a step of about 2 ms on one thread, that logs every step."""
    import torch

    torch.set_num_threads(1)
    if logger == "stoker":
        os.environ["STOKER_SINKS"] = "mlflow"
    size = _two_milliseconds(torch)
    a, b = torch.randn(size, 512), torch.randn(512, 512)
    with LOGGERS[logger]() as log:
        began = counted_from = time.perf_counter()
        steps = counted = 0
        while (now := time.perf_counter()) - began < seconds:
            if now - began < min(5.0, seconds / 2):  # the follower is starting: measured below, not here
                counted_from, counted = now, steps
            (a @ b).sum().item()
            steps += 1
            log(steps, _values(steps))
        return (steps - counted) / (time.perf_counter() - counted_from)


def _two_milliseconds(torch: Any) -> int:
    """How many rows make a product of 2 ms. The same in every process: it is a power of two."""
    return int(os.environ.get("STOKER_BENCH_ROWS", "512"))


def rows_of_two_milliseconds() -> int:
    """Calibrated once, for all processes of a benchmark."""
    import torch

    torch.set_num_threads(1)
    b = torch.randn(512, 512)
    rows = 32
    while rows < 16384:
        a = torch.randn(rows, 512)
        times = []
        for _ in range(30):
            began = time.perf_counter()
            (a @ b).sum().item()
            times.append(time.perf_counter() - began)
        if median(times) >= 1.8e-3:
            break
        rows = int(rows * min(2.0, max(1.1, 2e-3 / median(times))))
    return rows


def kill(logger: str, points: int) -> int:
    """How many of so many points are lost when the process is killed right after `log` returned."""
    calls = points // len(FIVE)
    child = os.fork()
    if child == 0:
        with LOGGERS[logger]() as log:
            for step in range(1, calls + 1):
                log(step, _values(step))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(2.0)  # what a helper process of the logger still holds, it may write
    return calls * len(FIVE) - FOUND[logger]()


def _found_stoker() -> int:
    from stoker.run import finding, view

    (run,) = finding.every(Path("runs"))
    return sum(len(series) for series in view.load(run).points.values())


def _found_wandb() -> int:
    from stoker.tracking import wandb_files

    files = Path("wandb").glob("offline-run-*/*.wandb")
    return sum(name in FIVE for file in files for row in wandb_files.history(file) for name in row)


def _found_tensorboard() -> int:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator("tensorboard", size_guidance={"scalars": 0})
    seen.Reload()
    return sum(len(seen.Scalars(tag)) for tag in seen.Tags()["scalars"])


def _found_mlflow() -> int:
    import sqlite3

    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        return int(database.execute("select count(*) from metrics").fetchone()[0])


FOUND: dict[str, Callable[[], int]] = {
    "stoker": _found_stoker,
    "wandb": _found_wandb,
    "tensorboard": _found_tensorboard,
    "mlflow": _found_mlflow,
    "mlflow_async": _found_mlflow,
}


def ship(how: str, points: int) -> float:
    """Points a second into MLflow on SQLite: a follower's, or those of direct calls of log_batch."""
    from stoker.tracking import follower, store
    from stoker.tracking.mlflow_sink import make_store

    Path("runs").mkdir()
    make_store(store.database(Path("runs")))
    run = _write_journal(Path("runs"), points, len(FIVE))
    os.environ["STOKER_SINKS"] = "mlflow"
    began = time.perf_counter()
    if how == "follower":
        assert follower.follow(run, "mlflow")
    else:
        _log_batches(store.embedded_uri(Path("runs")), points)
    return points / (time.perf_counter() - began)


def _log_batches(uri: str, points: int) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("bench")).info.run_id
    metrics = []
    for step in range(1, points // len(FIVE) + 1):
        metrics += [
            Metric(name, value, 1_700_000_000_000 + step, step) for name, value in _values(step).items()
        ]
        if len(metrics) >= 1000:
            client.log_batch(run, metrics=metrics)
            metrics = []
    if metrics:
        client.log_batch(run, metrics=metrics)
    client.set_terminated(run)


def fold(points: int, metrics: int) -> dict[str, float]:
    """Seconds to fold a journal of so many points, and to open its compacted form; megabytes for it."""
    run = _write_journal(Path("runs"), points, metrics)
    before = _peak_megabytes()
    first = _timed_load(run)
    peak = _peak_megabytes()
    return {"fold": first, "compacted": _timed_load(run), "megabytes": peak, "before": before}


def _timed_load(run: Any) -> float:
    from stoker.run import view

    began = time.perf_counter()
    seen = view.load(run)
    total = sum(float(series.y.sum()) + len(series.x) for series in seen.points.values())
    assert total > 0
    return time.perf_counter() - began


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _write_journal(runs: Path, points: int, metrics: int) -> Any:
    """A run that has ended, written as `run.log` writes it."""
    from stoker.run import journal
    from stoker.run.directory import RunDirectory

    run = RunDirectory((runs / "bench" / "a").absolute())
    run.create({"uid": "bench", "id": "a", "experiment": "bench", "config": {"lr": 0.1}, "sources": {}})
    _, writer = journal.start_attempt(run.journal)
    writer.append("attempt_started", pid=1, host="here")
    for step in range(1, points // metrics + 1):
        writer.append("metrics", step=step, values=dict(list(_values(step).items())[:metrics]))
    writer.append("attempt_ended", status="finished")
    writer.close()
    return run


# -- the table ---------------------------------------------------------------------------------


def call_rows(quick: bool) -> list[Row]:
    rounds = 3 if quick else 7
    counts = {"wandb": 1000, "tensorboard": 1000, "mlflow": 30} if quick else {
        "wandb": 5000, "tensorboard": 5000, "mlflow": 300}  # fmt: skip
    goals = {"wandb": 30.0, "tensorboard": 40.0, "mlflow": 500.0}
    ours: list[dict[str, float]] = []
    ratios: dict[str, list[float]] = {name: [] for name in goals}
    theirs: dict[str, list[float]] = {name: [] for name in goals}
    for _ in range(rounds):
        for name in goals:
            mine = harness.measure(HERE, "call", logger="stoker", calls=5000 if quick else 20000)
            peer = harness.measure(HERE, "call", logger=name, calls=counts[name])
            ours.append(mine)
            theirs[name].append(peer["median"])
            ratios[name].append(peer["median"] / mine["median"])
    medians, tails = [o["median"] for o in ours], [o["p99"] for o in ours]
    peers = {name: median(values) for name, values in theirs.items()}
    rows = [
        Row("log of five scalars, median", "µs", median(medians), peers, None, spread(medians), "≤ 10 µs",
            median(medians) <= 10),
        Row("log of five scalars, 99th percentile", "µs", median(tails), {}, None, spread(tails), "≤ 50 µs",
            median(tails) <= 50),
    ]  # fmt: skip
    for name, goal in goals.items():
        found = ratios[name]
        rows.append(Row(f"log of five scalars, times less than {name}", "µs", median(medians),
                        {name: peers[name]}, median(found), spread(found), f"≥ {goal:.0f}×",
                        median(found) >= goal))  # fmt: skip
    return rows


def loop_rows(quick: bool) -> list[Row]:
    os.environ["STOKER_BENCH_ROWS"] = str(harness.measure(HERE, "rows"))
    seconds, rounds = (10.0, 1) if quick else (16.0, 3)
    slower: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in ("stoker", "wandb", "tensorboard", "mlflow_async", "mlflow"):
            without = harness.measure(HERE, "loop", logger="nothing", seconds=seconds / 2)
            logging = harness.measure(HERE, "loop", logger=name, seconds=seconds)
            again = harness.measure(HERE, "loop", logger="nothing", seconds=seconds / 2)
            slower.setdefault(name, []).append(100 * (1 - logging / ((without + again) / 2)))
    mine = slower.pop("stoker")
    peers = {name: median(found) for name, found in slower.items()}
    return [Row("slowdown of a loop of 2 ms steps that logs every one, follower on the same cores", "%",
                median(mine), peers, None, spread(mine), "≤ 3 %", median(mine) <= 3)]  # fmt: skip


def kill_rows(quick: bool) -> list[Row]:
    points = 20_000 if quick else 100_000
    few = 250 if quick else 2_000
    names = ("wandb", "tensorboard", "mlflow_async", "mlflow")
    peers = {}
    for name in names:
        count = few if "mlflow" in name else points
        lost = harness.measure(HERE, "kill", logger=name, points=count)
        peers[f"{name} (of {count:,})"] = lost
    lost = harness.measure(HERE, "kill", logger="stoker", points=points)
    what = f"points lost of {points:,} when killed right after log returned"
    return [Row(what, "points", lost, peers, None, None, "0", lost == 0)]


def ship_rows(quick: bool) -> list[Row]:
    points, rounds = (10_000, 2) if quick else (50_000, 5)
    ours, direct = [], []
    for _ in range(rounds):
        ours.append(harness.measure(HERE, "ship", how="follower", points=points))
        direct.append(harness.measure(HERE, "ship", how="direct", points=points))
    ratios = [mine / theirs for mine, theirs in zip(ours, direct, strict=True)]
    return [Row(f"shipping a backlog of {points:,} points into MLflow on SQLite", "points/s", median(ours),
                {"log_batch": median(direct)}, median(ratios), spread(ratios), "≥ 0.8 of log_batch",
                median(ratios) >= 0.8)]  # fmt: skip


def fold_rows(quick: bool) -> list[Row]:
    points, rounds = (200_000, 2) if quick else (1_000_000, 5)
    scale = points / 1_000_000
    rows = []
    for metrics in (1, 5):
        found = [harness.measure(HERE, "fold", points=points, metrics=metrics) for _ in range(rounds)]
        for key, unit, goal, what in (
            ("fold", "s", 2.0, "folding"), ("megabytes", "MB", 500.0, "peak memory of folding"),
            ("compacted", "s", 0.3, "opening the compacted form of"),
        ):  # fmt: skip
            values = [one[key] for one in found]
            limit = goal if key == "megabytes" else goal * scale
            rows.append(Row(f"{what} {points:,} points, {metrics} a call", unit, median(values), {}, None,
                            spread(values), f"< {limit:g} {unit}", median(values) < limit))  # fmt: skip
    return rows


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    rows: list[Row] = []
    for part in (call_rows, loop_rows, kill_rows, ship_rows, fold_rows):
        began = time.perf_counter()
        rows += part(asked.quick)
        print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    harness.report(rows, asked.json)


if __name__ == "__main__":
    measures = {"call": call, "loop": loop, "kill": kill, "ship": ship, "fold": fold,
                "rows": rows_of_two_milliseconds}  # fmt: skip
    if not harness.answer_measure(measures):
        main()
