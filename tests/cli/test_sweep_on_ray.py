"""`stoker sweep --on ray`: the same search on real raylets of this machine, whatever is killed of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import Command, Start
from ray_machines import Machines, started
from support import LONG, loaded, until

SEARCHED = str(Path(__file__).parent / "searched.py")
QUADRATIC = str(Path(__file__).parent / "quadratic.py")
ASHA = (
    "sweep", SEARCHED, "x=uniform(0, 1)", "kind=[near, far]", "pause=1", "--trials", "30",
    "--scheduler", "asha", "--least", "1", "--most", "9", "--parallel", "1", "--json",
)  # fmt: skip

NOTEBOOK = """
import os, subprocess, sys
import ray, stoker

recipe = sys.argv[1]
ray.init("local", num_cpus=1, include_dashboard=False)  # it asks for a token, which this process has
here = ray.get_runtime_context().gcs_address

def search(address):
    return stoker.sweep(
        recipe, {"x": "uniform(0, 1)", "steps": 2}, trials=1, name="s", on="ray", address=address
    ).best

best = search(None)
assert best == search("localhost:" + here.rpartition(":")[2]) == search("auto")
try:
    search("127.0.0.1:1")
except stoker.BadInput as error:
    assert f"connected to the Ray cluster at {here}; leave out the address" in str(error), error
assert ray.get(ray.put(1)) == 1
refused = subprocess.run(
    [sys.executable, "-m", "stoker", "sweep", recipe, "x=uniform(0, 1)", "--on", "ray", "--address", here],
    env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_gcs_server_port_wait_time_s": "1"},
)
assert refused.returncode == 2
"""

REFUSES = """
from dataclasses import dataclass
import stoker

@dataclass(frozen=True)
class Config:
    x: float = 0.0

def train(run: stoker.Run, config: Config) -> None:
    raise stoker.BadInput("a file of data is not here")
"""


class OnOneMachine(Machines):
    """One that knows what trains on it."""

    def trainers(self) -> list[psutil.Process]:
        """The processes that train."""
        started = [
            process
            for node in self.cluster.list_all_nodes() if node.all_processes.get("raylet")
            for process in self.raylet(node).children()
        ]  # fmt: skip

        return [process for host in started for process in _trains(host)]


def _trains(host: psutil.Process) -> list[psutil.Process]:
    """Below a host stands the server that forks them."""
    try:
        below = host.children(recursive=True)
        return [p for p in below if p.ppid() != host.pid and "forkserver" in "".join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[OnOneMachine]:
    with started(OnOneMachine) as made:
        yield made


def brief(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a sweep came to, without paths."""
    return [(t["number"], t["state"], t["value"], t["params"], t["values"]) for t in answer["trials"]]


@pytest.mark.soak(small=False)
def test_killed_at_random_moments_it_ends_as_on_one_machine_without(
    start: Start, stoker: Command, ray_cluster: OnOneMachine, tmp_path: Path
) -> None:
    """The process that trains, its host, or the controller, by SIGKILL; and by SIGTERM it stops by itself.

    A trial that dies four times and gets no further has failed: of three kills one waits until one did.
    """
    go = tmp_path / "go"
    go.touch()
    whole = stoker(*ASHA, f"until={go}", "--name", "whole")
    assert whole.code == 0, whole.err
    go.unlink()
    given = (*ASHA, f"until={go}", "--name", "parts", "--on", "ray", "--address", ray_cluster.address)
    draws = random.Random(0)
    kinds = ["trainer", "host", "controller"]
    process = start(*given)
    before = 0
    for number, kind in enumerate(kinds + [draws.choice(kinds) for _ in range(17)]):
        if number % 3 == 2:
            _wait_for_progress(process, tmp_path / "runs" / "parts", before)
        _wait_for_a_trainer(process, ray_cluster)
        time.sleep(draws.uniform(0.0, 0.4))
        trains = _wait_for_a_trainer(process, ray_cluster)
        before = _progress(tmp_path / "runs" / "parts")
        if kind == "controller":
            process.kill()
            process.communicate()
            _, alive = psutil.wait_procs([trains], timeout=LONG)
            assert not alive, "nothing trains without its controller"
            process = start(*given)
        else:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has come to its end meanwhile
                (trains if kind == "trainer" else trains.parents()[1]).kill()
    _wait_for_a_trainer(process, ray_cluster)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    go.touch()
    done = stoker(*given)
    assert done.code == 0, done.err
    assert brief(done.answer) == brief(whole.answer)
    for trial in done.answer["trials"]:
        assert [a.status for a in loaded(Path(trial["run"])).attempts].count("finished") <= 1


def _wait_for_progress(process: subprocess.Popen[bytes], sweep: Path, before: int) -> None:
    until(lambda: _progress(sweep) > before, process)


def _progress(sweep: Path) -> int:
    """How many steps the trials of a search came to at their furthest, together."""
    return sum(_furthest(run) for run in sweep.glob("trial-*"))


def _furthest(run: Path) -> int:
    """The highest step that any attempt logged a value at."""
    lines = [line for file in run.glob("journal/attempt-*") for line in file.read_bytes().split(b"\n")[:-1]]
    return max((json.loads(line)["step"] for line in lines if b'"type":"metrics"' in line), default=0)


def _wait_for_a_trainer(process: subprocess.Popen[bytes], cluster: OnOneMachine) -> psutil.Process:
    return until(cluster.trainers, process, every=0.2)[0]


@pytest.mark.soak(small=False)
def test_a_trial_over_two_machines_goes_on_when_one_is_lost_and_another_joins(
    start: Start, ray_cluster: OnOneMachine, tmp_path: Path
) -> None:
    """Of two ranks, which end early at the same step."""
    second, go = ray_cluster.join(), tmp_path / "go"
    process = start(
        "sweep", QUADRATIC, "h0=[0.1, 1.0, 0.2]", "h1=1.0", "precision=fp32", "pause=0.3", f"until={go}",
        "steps=40", "checkpoint_every=5", "--metric", "score", "--goal", "max", "--sampler", "grid",
        "--trials", "3", "--nproc", "2", "--scheduler", "asha-stop", "--factor", "2", "--least", "5",
        "--most", "40", "--on", "ray", "--address", ray_cluster.address, "--name", "s", "--json",
    )  # fmt: skip
    _wait_for_a_checkpoint(process, tmp_path / "runs" / "s")
    training = {*ray_cluster.trainers()}
    ray_cluster.raylet(second).kill()
    until(lambda: training - {*ray_cluster.trainers()}, process)  # else the trial may still reach its end
    go.touch()
    third = ray_cluster.join()
    try:
        out, err = process.communicate(timeout=LONG)
    finally:
        ray_cluster.cluster.remove_node(third, allow_graceful=False)
    assert process.returncode == 0, err.decode()
    answer = json.loads(out.decode().strip().splitlines()[-1])
    assert {t["state"] for t in answer["trials"]} == {"complete", "pruned"}
    attempts = []
    for trial in answer["trials"]:
        run = loaded(Path(trial["run"]))
        attempts += run.attempts
        assert run.attempts[-1].world == 2
        assert run.status == {"complete": "finished", "pruned": "stopped"}[trial["state"]]
        steps = [step for step, _ in run.points["score"].items()]
        assert steps == list(range(1, len(steps) + 1))
        assert (len(steps) == 40) == (trial["state"] == "complete")
    assert len(attempts) > len(answer["trials"]), "one was lost with its machine, and went on"


def _wait_for_a_checkpoint(process: subprocess.Popen[bytes], sweep: Path) -> None:
    until(lambda: list(sweep.glob("*/checkpoints/*/manifest.json")), process)


@pytest.mark.soak(small=False)
def test_a_machine_that_lacks_stoker_is_named_and_its_trials_run_elsewhere(
    stoker: Command, ray_cluster: OnOneMachine, tmp_path: Path
) -> None:
    (tmp_path / "without" / "stoker").mkdir(parents=True)
    (tmp_path / "without" / "stoker" / "__init__.py").touch()
    refuses = tmp_path / "refuses.py"
    refuses.write_text(REFUSES)
    on = ("--sampler", "grid", "--on", "ray", "--address", ray_cluster.address)
    node = ray_cluster.join(2, PYTHONPATH=str(tmp_path / "without"))
    try:
        done = stoker("sweep", SEARCHED, "x=[0.1, 0.2, 0.3, 0.4]", *on, "--json")
    finally:
        ray_cluster.leave(node)
    assert done.code == 0, done.err
    assert {trial["state"] for trial in done.answer["trials"]} == {"complete"}
    why = r"\S+ \([0-9.]+\) cannot run trials: ModuleNotFoundError: No module named 'stoker"
    assert re.search(why, " ".join(done.err.split()))
    assert "\x1b" not in done.err
    node = ray_cluster.join()
    try:
        done = stoker("sweep", str(refuses), "x=[1, 2]", *on, "--metric", "loss", "--goal", "min")
    finally:
        ray_cluster.leave(node)
    where = r"a file of data is not here \(on \S+ \([0-9.]+\)\)"
    assert re.search(where, " ".join(done.err.split())), done.err


def test_it_starts_ray_by_itself_and_failed_trials_are_told_apart(stoker: Command) -> None:
    done = stoker(
        "sweep", SEARCHED, "x=[0.1, 0.9, 0.2]", "fails=exit", "--sampler", "grid", "--on", "ray",
        "--parallel", "1", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    states = {t["params"]["x"]: t["state"] for t in done.answer["trials"]}
    assert states == {0.1: "complete", 0.9: "failed", 0.2: "complete"}
    (failed,) = [t for t in done.answer["trials"] if t["state"] == "failed"]
    assert "exited with code 3" in failed["error"]


def test_a_process_that_is_connected_searches_there_and_without_its_token_nobody_does(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script), SEARCHED], env={**environment, "HOME": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stoker: error: Ray asks for a token: set RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--on", "rey"), "did you mean 'ray'"),
        (("--address", "auto"), "also give --on ray"),
        (("--on", "ray", "--address", "127.0.0.1:1"), "cannot reach a Ray cluster there"),
        (("--on", "ray", "--address", "CLUSTER", "--nproc", "7"), "the cluster has 1 CPUs on 1 machine"),
    ],
)
def test_what_no_cluster_can_run_starts_nothing(
    given: tuple[str, ...], said: str, stoker: Command, ray_cluster: OnOneMachine, tmp_path: Path
) -> None:
    given = tuple(ray_cluster.address if word == "CLUSTER" else word for word in given)
    done = stoker("sweep", QUADRATIC, "h0=uniform(0, 1)", "--metric", "score", "--goal", "max",
                  *given)  # fmt: skip
    assert done.code == 2, done.err
    assert said in done.err
    assert not (tmp_path / "runs").exists()
