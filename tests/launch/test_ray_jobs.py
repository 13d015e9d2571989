"""`--on ray`: a real cluster of two nodes on this machine, with the dashboard that jobs are handed to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.exceptions import (
    LocalRayletDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.job_submission import JobSubmissionClient
from stoker.launch import ray_nodes

from commands import Command, Done
from ray_machines import Machines, started
from servers import Proxy
from support import LONG, loaded, points, until

RECIPE = str(Path(__file__).parents[1] / "cli" / "ranked.py")
SAME = ("train", RECIPE, "precision=fp32", "steps=100", "checkpoint_every=20")

READS_A_FILE = """
from dataclasses import dataclass
from pathlib import Path
import stoker

@dataclass(frozen=True)
class Config:
    steps: int = 3

def train(run: stoker.Run, config: Config) -> None:
    factor = float((Path(__file__).parent / "data" / "factor.txt").read_text())
    for step in range(1, config.steps + 1):
        run.log(step=step, loss=factor / step)
"""


class WithDashboard(Machines):
    """A head and one more node."""

    def __init__(self) -> None:
        super().__init__(dashboard=True)
        self.other = self.join()

    def lose(self) -> None:
        """All processes of the node that is not the head, as when its power is cut."""
        raylet = self.raylet(self.other)
        for process in [*raylet.children(recursive=True), raylet]:
            process.kill()


@pytest.fixture(scope="module")
def of_two() -> Iterator[WithDashboard]:
    with started(WithDashboard) as made:
        yield made


def _writes(process: psutil.Process, run: Path) -> bool:
    try:
        return any(file.path.startswith(f"{run}/") for file in process.open_files())
    except psutil.Error:
        return False


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.check_output(["git", *identity, *words], cwd=folder, text=True).strip()


def _of_a_task(cause: Exception) -> RayError:
    """As `ray.get` raises it."""
    trace = f"Traceback (most recent call last):\n  File a\n{type(cause).__name__}: {cause}"
    return RayTaskError("f", trace, cause, proctitle="f", pid=1, ip="10.0.0.7").as_instanceof_cause()


def _wait_for_end(cluster: WithDashboard, submitted: Done) -> None:
    """Wait until a job is over; asked here, since each command that asks imports Ray."""
    client, job = JobSubmissionClient(cluster.dashboard), submitted.answer["native"]
    until(lambda: client.get_job_status(job).is_terminal(), every=0.5)


def test_a_run_over_two_nodes_goes_on_to_the_same_bits_when_one_is_lost(
    of_two: WithDashboard, stoker: Command, tmp_path: Path
) -> None:
    on = (
        "--on",
        "ray",
        "--option",
        f"address={of_two.dashboard}",
        "--nodes",
        "2",
        "--env",
        "STOKER_SINKS=none",
    )
    run, go = tmp_path / "runs" / "ranked" / "a", tmp_path / "go"
    waits = f"while not __import__('os').path.exists({str(go)!r}):\n                time.sleep(0.05)"
    recipe = tmp_path / "ranked.py"
    recipe.write_text(Path(RECIPE).read_text().replace("time.sleep(config.pause)", waits))
    done = stoker("train", str(recipe), *SAME[2:], "pause_from=30", *on, "--name", "a", "--json")
    assert done.code == 0, done.err
    until(lambda: points(run) >= 30)
    of_two.lose()
    of_two.other = of_two.join()

    def state() -> str:
        return str(stoker("jobs", "list", "--json").answer["jobs"][0]["state"])

    assert state() == "running"
    go.touch()  # which it does not end without
    _wait_for_end(of_two, done)
    assert state() == "done", stoker("jobs", "logs", "a").out
    seen = loaded(run)
    assert [attempt.world for attempt in seen.attempts] == [2, 2]
    assert list(seen.points["loss"].x) == list(range(1, 101))
    assert stoker(*SAME, "--nproc", "2", "--name", "whole").code == 0
    of = [tmp_path / "runs" / "ranked" / name / "artifacts" / "model.safetensors" for name in ("a", "whole")]
    assert of[0].read_bytes() == of[1].read_bytes()
    said = stoker("jobs", "logs", "a").out
    assert "a node was lost; starting again" in said
    assert "[node 0] " in said or "[node 1] " in said  # whichever rank 0 was on
    followed = stoker("jobs", "logs", "a", "--rank", "1", "--follow")
    assert followed.err == ""
    of_one = followed.out.splitlines()
    assert of_one
    assert all(line.startswith("[rank 1] ") for line in of_one)


@pytest.mark.soak(small=False)
def test_a_job_that_reaches_its_time_limit_goes_on_and_leaves_a_checkpoint_where_it_is_cancelled(
    of_two: WithDashboard, stoker: Command, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "ranked" / "t"
    on = ("--on", "ray", "--option", f"address={of_two.dashboard}", "--env", "STOKER_SINKS=none")
    done = stoker(*SAME, "pause=1", *on, "--name", "t", "--time", "16s", "--json")
    assert done.code == 0, done.err

    def gone_on() -> bool:
        seen = loaded(run) if (run / "run.json").is_file() else None
        return seen is not None and seen.step > (seen.attempts[-1].resumed_from or 100)

    until(gone_on, every=0.5)
    assert {attempt.status for attempt in loaded(run).attempts[:-1]} == {"preempted"}
    assert stoker("jobs", "cancel", "t").code == 0
    _wait_for_end(of_two, done)
    assert stoker("jobs", "list", "--json").answer["jobs"][0]["state"] == "cancelled"
    seen = loaded(run)
    assert seen.status == "preempted"
    assert seen.step < 100
    assert (run / "checkpoints" / f"step-{seen.step:08d}" / "manifest.json").is_file()


@pytest.mark.soak(small=False)
def test_a_job_that_is_cancelled_at_once_does_not_end_its_step_and_all_it_wrote_is_in_the_store(
    of_two: WithDashboard, stoker: Command, tmp_path: Path, proxy: Proxy
) -> None:
    where = ("--runs", f"s3://bucket/{uuid.uuid4().hex}")
    cluster = {"RAY_API_SERVER_ADDRESS": of_two.dashboard, "STOKER_CACHE": str(tmp_path / "nodes")}
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id=x\naws_secret_access_key=x\n")
    given = {
        "AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials), "STOKER_CACHE": cluster["STOKER_CACHE"],
        "STOKER_SINKS": "none",
    }  # fmt: skip
    variables = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
    on = ("--on", "ray", "--nodes", "2", *where, *variables)
    done = stoker(*SAME, "pause=100", *on, "--name", "n", "--json", env=cluster)
    assert done.code == 0, done.err
    run = Path(done.answer["folder"]).parents[1] / "ranked" / "n"
    until(lambda: points(run) > 0)
    ranks = [process for process in psutil.process_iter() if _writes(process, run)]
    assert len(ranks) >= 2
    assert stoker("jobs", "cancel", "n", "--now", *where, env=cluster).code == 0

    def state() -> str:
        return str(stoker("jobs", "list", *where, "--json", env=cluster).answer["jobs"][0]["state"])

    _wait_for_end(of_two, done)
    assert state() == "cancelled"
    assert not psutil.wait_procs(ranks, timeout=LONG)[1]
    assert loaded(run).step == 1

    gone = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "STOKER_CACHE": str(tmp_path / "mine")}
    there, stored = (stoker("jobs", "logs", "n", *where, env=env) for env in (cluster, gone))
    deadline = time.monotonic() + LONG  # what brings a run to the store outlives the ranks that were killed
    while len(stored.out) < len(there.out) and time.monotonic() < deadline:
        time.sleep(2)
        stored = stoker("jobs", "logs", "n", *where, env=gone)
    assert "showing the logs that were uploaded to s3://bucket/" in stored.err
    assert "is machine 0 of 2" in stored.out
    for source in ("[node ", "[rank 0] ", "[rank 1] "):
        assert source in stored.out
    assert sorted(stored.out.splitlines()) == sorted(there.out.splitlines())

    (known,) = stoker("jobs", "list", *where, "--json", env=cluster).answer["jobs"]
    assert JobSubmissionClient(of_two.dashboard).delete_job(known["native"])
    assert state() == "cancelled"
    forgotten = stoker("jobs", "logs", "n", *where, env=cluster)
    assert "not found in the cluster; showing the logs that were uploaded to" in forgotten.err
    assert sorted(forgotten.out.splitlines()) == sorted(there.out.splitlines())


@pytest.mark.soak(small=False)
def test_a_node_that_lacks_what_a_job_needs_ends_it_at_once_and_says_which_and_why(
    of_two: WithDashboard, stoker: Command, tmp_path: Path
) -> None:
    on = ("--on", "ray", "--option", f"address={of_two.dashboard}")

    def ended(name: str, *given: str, cwd: Path = tmp_path, gone: bool = False) -> str:
        """What the job's log says; it has failed with the exit code for bad input."""
        where = ("--runs", str(tmp_path / "runs")) if gone else ()
        done = stoker(*SAME, *on, "--name", name, *given, *where, "--json", cwd=cwd)
        assert done.code == 0, done.err
        if gone:
            cwd.rmdir()
        _wait_for_end(of_two, done)
        info = JobSubmissionClient(of_two.dashboard).get_job_info(done.answer["native"])
        assert "exit code 2" in (info.message or "")
        return stoker("jobs", "logs", name).out

    (tmp_path / "without" / "stoker").mkdir(parents=True)
    (tmp_path / "without" / "stoker" / "__init__.py").touch()
    without = of_two.join(2, PYTHONPATH=str(tmp_path / "without"))
    said = ended("without", "--cpus", "2")
    of_two.leave(without)
    cause = r"stoker: node 0, \S+ \([0-9.]+\): stoker cannot be run there: ModuleNotFoundError: No module "
    assert re.search(cause, said)
    assert "starting again" not in said

    two = [of_two.join(2, STOKER_RUNS=str(tmp_path / name)) for name in ("one", "other")]
    begun = time.monotonic()
    said = ended("apart", "--cpus", "2", "--nodes", "2")
    assert time.monotonic() - begun < LONG, "the other launcher did not wait for this one"
    assert "is not the one that the other machines use" in said
    for node in two:
        of_two.leave(node)

    (tmp_path / "gone").mkdir()
    said = ended("gone", cwd=tmp_path / "gone", gone=True)
    assert f": the folder {tmp_path}/gone does not exist there; to send it, add --option " in said
    assert "Traceback" not in said


def test_what_may_be_over_the_next_time_takes_a_retry(of_two: WithDashboard) -> None:
    unreadable = "/" + "a" * 300
    given = ("--name", "a", "--nodes", "1", "--cpus", "1", "--retries", "1", "--folder", unreadable)
    done = subprocess.run(
        [sys.executable, "-m", "stoker.launch.ray_nodes", *given, "--", "true"],
        env={**os.environ, "RAY_ADDRESS": of_two.address}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("stoker: ")]
    assert said[1] == "stoker: exit code 1; starting again, retries left: 0"
    assert len(said) == 3
    for line in (said[0], said[2]):
        assert re.match(r"stoker: node 0, \S+ \([0-9.]+\): OSError: .* File name too long", line)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (_of_a_task(ModuleNotFoundError("no")), 2, "stoker cannot be run there: ModuleNotFoundError: no"),
        (_of_a_task(OSError("stale")), 1, "OSError: stale"),
        (RuntimeEnvSetupError("Traceback:\n  a\nOSError: s3 says 503"), 1, "OSError: s3 says 503"),
        (OutOfMemoryError("Task was killed\nSee the docs"), 1, "Task was killed"),
        (LocalRayletDiedError(), 1, "The task's local raylet died."),
    ],
)
def test_only_a_node_that_lacks_a_module_is_taken_to_stay_as_it_is(
    error: RayError, code: int, said: str
) -> None:
    failure = ray_nodes._failure(error)
    assert failure.exit_code == code
    assert str(failure).startswith(said)


def test_code_that_was_sent_is_recorded_with_its_commit_and_all_files_and_runs_again(
    of_two: WithDashboard, stoker: Command, tmp_path: Path
) -> None:
    project, runs = tmp_path / "project", tmp_path / "shared"
    (project / "data").mkdir(parents=True)
    (project / "mine.py").write_text(READS_A_FILE)
    (project / "data" / "factor.txt").write_text("2")
    for words in (("init", "-b", "main"), ("add", "."), ("commit", "-m", "first")):
        _git(project, *words)
    (project / "data" / "factor.txt").write_text("3")
    on = ("--on", "ray", "--option", f"address={of_two.dashboard}", "--option", "working-dir=.")
    done = stoker("train", "mine.py", *on, "--runs", str(runs), "--name", "a", "--json", cwd=project)
    assert done.code == 0, done.err
    assert done.err == "", "Ray says nothing of how it packs a folder"
    client = JobSubmissionClient(of_two.dashboard)
    native = done.answer["native"]
    until(lambda: client.get_job_status(native).is_terminal(), every=0.5)
    run = runs / "mine" / "a"
    assert loaded(run).status == "finished", client.get_job_logs(native)
    code = json.loads((run / "provenance" / "code.json").read_bytes())
    assert code["kind"] == "git"
    assert code["commit"] == _git(project, "rev-parse", "HEAD")
    assert (code["branch"], code["dirty"], code["untracked"]) == ("main", True, [])
    assert [file["path"] for file in code["files"]] == ["data/factor.txt", "mine.py"]
    assert "+3" in (run / "provenance" / "diff.patch").read_text()
    assert "STOKER_SHIPPED" not in (run / "provenance" / "environment.json").read_text()
    again = stoker("reproduce", "a", "--runs", str(runs))
    assert again.code == 0, again.out + again.err


def test_what_the_cluster_does_not_have_is_refused(
    of_two: WithDashboard, stoker: Command, tmp_path: Path
) -> None:
    on = ("--on", "ray", "--option", f"address={of_two.dashboard}")
    for asked, said in (
        (("--gpus", "2"), "--gpus 2: a node of this cluster has at most 0"),
        (("--memory", "99TB"), "--memory 101376G: a node of this cluster has "),
        (("--nodes", "8"), "--nodes 8: this cluster has 2 nodes with the requested resources"),
    ):
        done = stoker(*SAME, *on, *asked)
        assert done.code == 2
        assert said in done.err
        assert "if it adds nodes when asked, add --option scales=true" in done.err
    assert not (tmp_path / "runs" / ".jobs").exists()
    waits = stoker(*SAME, *on, "--gpus", "2", "--option", "scales=true", "--name", "waits", "--json")
    assert waits.code == 0, waits.err
    assert stoker("jobs", "cancel", "waits").code == 0


def test_what_would_be_submitted_is_printed_as_ray_takes_it(stoker: Command) -> None:
    done = stoker(
        *SAME, "--on", "ray", "--nodes", "2", "--gpus", "1", "--name", "a", "--time", "4h", "--dry-run"
    )
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert " -m stoker.launch.ray_nodes --name ranked-a-" in made["entrypoint"]
    assert " --nodes 2 --cpus 1 --gpus 1 --folder " in made["entrypoint"]
    assert "--rendezvous '{rendezvous}'" in made["entrypoint"]
    assert made["entrypoint"].endswith(" --max-time 14400s")  # Ray has no time limit of its own


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--option", "address=http://127.0.0.1:1"), "no Ray cluster answers at http://127.0.0.1:1"),
        (("--option", "adress=http://127.0.0.1:1"), "did you mean 'address'"),
        (("--option", "scales=yes"), "--option scales=yes: must be true or false"),
        (("--option", "working-dir=."), "runs would be stored in a folder of Ray's on some node"),
    ],
)
def test_without_a_cluster_nothing_is_written(
    given: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    done = stoker(*SAME, "--on", "ray", *given)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "runs").exists()


def test_where_no_cluster_answers_it_says_which_variable_it_went_by(stoker: Command) -> None:
    done = stoker(*SAME, "--on", "ray", env={"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"})
    assert done.code == 2
    assert "no Ray cluster answers at RAY_API_SERVER_ADDRESS=http://127.0.0.1:1 (" in done.err


def test_a_url_is_given_to_ray_as_it_is_and_nodes_are_to_share_the_working_copy_of_a_store(
    stoker: Command, tmp_path: Path
) -> None:
    where = ("--runs", "s3://bucket/runs", "--nodes", "2", "--option", "address=http://127.0.0.1:1")
    given = (*SAME, "--on", "ray", *where, "--option", "working-dir=s3://bucket/code.zip")
    made = json.loads(stoker(*given, "--dry-run").out)
    assert made["runtime_env"]["working_dir"] == "s3://bucket/code.zip"
    assert "--folder" not in made["entrypoint"]
    warning = "the nodes must share the working copy of s3://bucket/runs"
    assert warning in " ".join(stoker(*given).err.split())
    assert warning not in " ".join(stoker(*given, "--env", "STOKER_CACHE=/shared").err.split())
