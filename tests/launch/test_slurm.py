"""Jobs on a real Slurm, which the tests start and stop."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from safetensors.torch import load_file
from stoker import object_store
from stoker.launch import job_uploader, jobs, slurm_script
from stoker.launch import slurm as slurm_jobs
from stoker.launch.jobspec import JobSpec
from stoker.run import finding

import servers
import slurm_cluster
from commands import SECRET, Command, Start
from support import LONG, SOAK, loaded, suspend, until

RECIPE = str(Path(__file__).parent / "waiting.py")
SEARCHED = str(Path(__file__).parents[1] / "cli" / "searched.py")
SAME = ("train", RECIPE, "precision=fp32", "checkpoint_every=1000")
_WAITS = "while :; do sleep 600 & wait; done"
"""Of a shell with a trap: a signal to all processes of a step may reach `sleep` first."""

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}"
)


@pytest.fixture(scope="module")
def configuration() -> Iterator[Path]:
    with slurm_cluster.cluster(2) as config:
        yield config


@pytest.fixture(autouse=True)
def slurm(configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(configuration))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs are submitted, of a name that a script has to quote."""
    made = tmp_path / "it's 100% mine"
    made.mkdir()
    return made


def _slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _state(number: str) -> str:
    """Of a job, or of what is left of an array; one that has just ended is not let wait for two minutes.

    It has to wait a second or two: a node does not take a job again at the time that it ended there.
    """
    form = ("--noheader", "--array", "--states=all", "--format=%i %T %r %S")
    jobs = [line.split() for line in _slurm("squeue", *form, f"--jobs={number}").splitlines()]
    for one, state, reason, start in jobs:
        late = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 10))
        if (state, reason) == ("PENDING", "BeginTime") and start != "N/A" and start > late:
            subprocess.run(["scontrol", "update", f"JobId={one}", "StartTime=now+2"], check=False)
    states = {job[1] for job in jobs}
    return next((state for state in ("RUNNING", "PENDING", "COMPLETING") if state in states), min(states))


def _over(number: str) -> str:
    """Wait until a job does nothing more; returns Slurm's word for how it ended."""
    until(lambda: _state(number) not in ("PENDING", "RUNNING", "COMPLETING"), every=0.3)
    return _state(number)


def _at(run: Path, step: int) -> bool:
    return (run / "run.json").exists() and loaded(run).step >= step


def _weights(run: Path) -> dict[str, list[float]]:
    return {n: t.flatten().tolist() for n, t in load_file(run / "artifacts" / "model.safetensors").items()}


def _written(folder: Path) -> str:
    """What the jobs of a folder have written, for an assertion that fails."""
    return "\n".join(file.read_text() for file in sorted(folder.glob("runs/.jobs/*/*.[lt][ox][gt]")))


@pytest.mark.soak
def test_a_job_that_reaches_its_time_limit_and_is_preempted_ends_in_the_same_bits(
    stoker: Command, folder: Path
) -> None:
    note, ranks = "note=a \"b\" $HOME 'c' \\ `d` *", ("--nproc", "2" if SOAK else "1")
    asked = ("--on", "slurm", "--time", "1h", "--option", "signal=USR1@280", "--env", "NOTED=x y")
    done = stoker(*SAME, "waits=[20, 40]", note, *ranks, "--name", "a", *asked, "--json", cwd=folder)
    assert done.code == 0, done.err
    number, run = done.answer["native"], folder / "runs" / "waiting" / "a"

    until(lambda: _at(run, 19), every=0.3)
    # Its limit is so near only once it waits there: Slurm gives its warning within half a minute.
    _slurm("scontrol", "update", f"JobId={number}", "TimeLimit=5")
    until(lambda: loaded(run).status == "preempted", every=0.3)
    _slurm("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    until(lambda: _state(number) == "RUNNING" and _at(run, 39), every=0.3)
    node = _slurm("squeue", "--noheader", f"--jobs={number}", "--format=%N")
    _slurm("srun", "--partition=high", f"--nodelist={node}", "--exclusive", "true")  # takes the job's node
    assert loaded(run).status == "preempted", _written(folder)
    assert _over(number) == "COMPLETED", _written(folder)

    seen = loaded(run)
    # A process alone stops where it waits; several agree on the end of the next step.
    assert [attempt.resumed_from for attempt in seen.attempts[1:]] == ([20, 40] if SOAK else [19, 39])
    assert seen.config["note"] == note.removeprefix("note=")
    attempts = next(folder.glob("runs/.jobs/*/attempts.txt")).read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in attempts] == ["begins", "75", "begins", "75", "begins", "0"]
    assert stoker(*SAME, *ranks, "--name", "whole", cwd=folder).code == 0
    whole = folder / "runs" / "waiting" / "whole"
    assert _weights(run) == _weights(whole)
    assert list(seen.points["loss"].items()) == list(loaded(whole).points["loss"].items())


def test_two_nodes_train_one_run_and_its_logs_are_followed_to_the_end(
    stoker: Command, start: Start, folder: Path
) -> None:
    done = stoker(*SAME, "--nodes", "2", "--name", "b", "--on", "slurm", cwd=folder)
    assert done.code == 0, done.err
    followed = start("jobs", "logs", "b", "--follow", cwd=folder)
    out, _ = followed.communicate(timeout=LONG)
    said = out.decode()
    run = folder / "runs" / "waiting" / "b"
    assert loaded(run).status == "finished", said
    assert [attempt.world for attempt in loaded(run).attempts] == [2]
    assert "is machine 0 of 2" in said
    for line in ("[rank 0] ", "[rank 1] "):
        assert line in said
    one = stoker("jobs", "logs", "b", "--rank", "1", cwd=folder).out.splitlines()
    assert one
    assert all(line.startswith("[rank 1] ") for line in one)
    assert "waiting/b finished at step 60" in said
    known = stoker("jobs", "list", "--json", cwd=folder).answer["jobs"]
    assert [(job["state"], job["runs"], job["step"]) for job in known] == [("done", ["waiting/b"], 60)]
    assert stoker("runs", "list", "--json", cwd=folder).answer["runs"][0]["id"] == "b"


def test_a_job_that_is_cancelled_leaves_a_checkpoint_and_is_not_queued_again(
    stoker: Command, folder: Path
) -> None:
    submitted = ("--on", "slurm", "--json", "--cpus", "2")
    running = stoker(*SAME, "waits=[20]", "--name", "c", *submitted, cwd=folder).answer
    run = folder / "runs" / "waiting" / "c"
    until(lambda: _at(run, 19), every=0.3)
    again = stoker(*SAME, "waits=[20]", "--name", "c", *submitted, cwd=folder)
    assert again.code == 2
    assert f"job {running['job']} already trains this run" in again.err
    queued = stoker(*SAME, "--name", "d", *submitted, "--option", "begin=now+1hour", cwd=folder).answer
    assert stoker("jobs", "logs", "d", cwd=folder).err.endswith("the job is queued (BeginTime)\n")
    for job in (running, queued):
        assert stoker("jobs", "cancel", job["native"], cwd=folder).code == 0
        _over(job["native"])
    states = [job["state"] for job in stoker("jobs", "list", "--json", cwd=folder).answer["jobs"]]
    assert states == ["cancelled", "cancelled"]
    assert loaded(run).status == "preempted"
    assert (run / "checkpoints" / f"step-{loaded(run).step:08d}" / "manifest.json").is_file()
    assert not (folder / "runs" / "waiting" / "d").exists()
    said = (folder / "runs" / ".jobs" / running["job"] / "slurm.log").read_text()
    assert "disabled" not in said  # as Slurm calls to queue again what may not be
    over = stoker("jobs", "cancel", "c", cwd=folder)
    assert over.code == 2
    assert "is over: cancelled" in over.err


def _submitted(spec: JobSpec, runs: tuple[str, ...], before_srun: str = "") -> jobs.Job:
    job = jobs.signed(jobs.planned("slurm", spec, spec.folder / "runs", runs))
    script = slurm_jobs.render(job).replace("\nsrun ", f"\n{before_srun}\nsrun ")
    return jobs.remember(job, slurm_jobs.submit(job, script))


def test_what_was_typed_is_worth_more_than_variables_of_the_shell_and_of_a_job_around_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "scontrol show job $SLURM_JOB_ID > shown; echo $GIVEN ${SLURM_GPUS-no} $SLURM_MINE > has"
    spec = JobSpec(
        name="h", command=("bash", "-c", run), folder=folder, time=600.0, passed=("GIVEN", "SLURM_MINE")
    )
    shell = {
        "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "",
        "SBATCH_NO_REQUEUE": "", "SBATCH_OUTPUT": "none.log", "SBATCH_CPUS_PER_GPU": "9",
        "SBATCH_PARTITION": "high", "GIVEN": "given",
    }  # fmt: skip
    outer = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "9999999", "SLURM_GPUS": "9", "SLURM_MINE": "mine"}
    for name, value in (shell | outer).items():
        monkeypatch.setenv(name, value)
    job = _submitted(spec, ("h",))
    assert _over(job.native) == "COMPLETED", _written(folder)
    shown = dict(word.partition("=")[::2] for word in (folder / "shown").read_text().split())
    kept = ("TimeLimit", "Requeue", "Partition", "ArrayTaskId")
    assert [shown.get(name) for name in kept] == ["00:10:00", "1", "high", None]
    assert (folder / "has").read_text() == "given no mine\n"
    assert "# sbatch also reads: SBATCH_PARTITION\n" in (job.folder / "script.sh").read_text()

    typed = dataclasses.replace(spec, options={"partition": "low", "begin": "now+1hour"})
    number = _submitted(typed, ("h",)).native
    assert _slurm("squeue", "--noheader", f"--jobs={number}", "--format=%P") == "low"
    _slurm("scancel", number)


def test_tasks_of_srun_that_do_not_know_of_each_other_are_told_so(stoker: Command, folder: Path) -> None:
    said, asked = (
        "this step of Slurm has 2 tasks, and this one trains by itself",
        ("--name", "a", "--dry-run"),
    )
    srun = ("srun", "--nodes=1", "--ntasks=2", sys.executable, "-m", "stoker", "train", SEARCHED, *asked)
    done = subprocess.run(srun, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count(said)) == (0, 2)
    tasks = {"SLURM_STEP_NUM_TASKS": "2"}
    for other in ({"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}):
        alone = stoker("train", SEARCHED, *asked, env=tasks | other, cwd=folder)
        assert (alone.code, said in alone.err) == (0, False)


def test_an_array_of_which_an_element_has_ended_is_cancelled_whole(stoker: Command, folder: Path) -> None:
    run = "[ $SLURM_ARRAY_TASK_ID = 0 ] && exit 0; trap 'touch told; exit 75' TERM; touch up; " + _WAITS
    spec = JobSpec(name="f", command=("bash", "-c", run), folder=folder, elements=2)
    number = _submitted(spec, ("f-0", "f-1")).native
    form = ("squeue", "--noheader", "--states=all", "--format=%T")
    until(lambda: _slurm(*form, f"--jobs={number}_0") == "COMPLETED" and (folder / "up").exists(), every=0.3)
    of_the_shell = {"SQUEUE_USERS": "nobody", "SCANCEL_INTERACTIVE": "1", "SCANCEL_VERBOSE": "1"}
    done = stoker("jobs", "cancel", number, cwd=folder, env=of_the_shell)
    assert done.code == 0, done.err
    until(lambda: _slurm(*form, f"--jobs={number}_1") == "FAILED", every=0.3)
    assert (folder / "told").exists()
    assert stoker("jobs", "list", "--json", cwd=folder).answer["jobs"][0]["state"] == "cancelled"


def test_a_job_that_is_cancelled_before_its_launchers_start_does_not_start_them(
    stoker: Command, folder: Path
) -> None:
    spec = JobSpec(name="g", command=("touch", "trained"), folder=folder)
    number = _submitted(spec, ("g",), before_srun="touch up; sleep 600").native
    until((folder / "up").exists, every=0.3)
    assert stoker("jobs", "cancel", number, cwd=folder).code == 0
    assert _over(number) == "CANCELLED"
    assert not (folder / "trained").exists()


@pytest.mark.soak(small=False)
def test_a_job_that_is_suspended_is_shown_so_and_is_ended_by_a_cancel(stoker: Command, folder: Path) -> None:
    spec = JobSpec(name="h", command=("bash", "-c", "touch up; exec sleep 60"), folder=folder)
    number = _submitted(spec, ("h",)).native
    until((folder / "up").exists, every=0.3)
    _slurm("scontrol", "suspend", number)
    assert stoker("jobs", "list", "--json", cwd=folder).answer["jobs"][0]["state"] == "suspended"
    done = stoker("jobs", "cancel", number, cwd=folder)
    assert done.code == 0, done.err
    assert "was suspended; it ends at once, and is not queued again" in done.out
    assert _over(number) == "CANCELLED"


def _scontrol(folder: Path, fails: int) -> str:
    """A PATH on which scontrol gets no answer so many times, and then is the real one."""
    made = folder / "bin" / "scontrol"
    made.parent.mkdir()
    made.write_text(
        f"#!/bin/sh\necho >> {made}.calls\n[ $(wc -l < {made}.calls) -gt {fails} ] || exit 1\n"
        f'exec {shutil.which("scontrol")} "$@"\n'
    )
    made.chmod(0o755)
    return f"{made.parent}:{os.environ['PATH']}"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("fails", "patience", "ends"), [(2, 600, "COMPLETED"), *([(1000, 4, "FAILED")] if SOAK else [])]
)
def test_a_job_that_stops_while_slurm_does_not_answer_is_queued_again_once_it_does(
    fails: int, patience: int, ends: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_script, "_PATIENCE", patience)
    spec = JobSpec(name="i", command=("bash", "-c", "[ -e up ] || { touch up; exit 75; }"), folder=folder)
    with monkeypatch.context() as of_job:
        of_job.setenv("PATH", _scontrol(tmp_path, fails))
        number = _submitted(spec, ("i",)).native
    assert _over(number) == ends, _written(folder)
    gave_up = "Slurm does not queue the job again, see above" in _written(folder)
    assert gave_up == (ends == "FAILED")


def test_a_job_that_twice_reaches_its_time_limit_before_it_trains_is_not_queued_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_script, "_EARLIER", 600)  # so that Slurm's own warning does not come before
    command = ("bash", "-c", f"trap 'exit 75' USR1 TERM; echo >> up; {_WAITS}")
    option = {"signal": "USR1@50"}
    spec = JobSpec(name="k", command=command, folder=folder, cpus=2, time=600, options=option)
    job = _submitted(spec, ("waiting/k",))
    number, told = job.native, ("scancel", "--signal=USR1", job.native)  # as Slurm before the limit
    taken = ("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    for attempt, stop in enumerate([told, taken, told, told], start=1):
        until(lambda n=attempt: _state(number) == "RUNNING" and _lines(folder / "up") == n, every=0.3)
        _slurm(*stop)
    assert _over(number) == "FAILED"
    assert "twice in a row no step was made until 50 seconds before the time limit" in _written(folder)
    attempts = (job.folder / slurm_script.ATTEMPTS).read_text().splitlines()
    ends = [line.split(" ", 2)[2] for line in attempts[1::2]]
    late = "no step, exit code"
    assert ends == [f"{late} 75", "exit code 75", f"{late} 75", f"{late} 2"]


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_what_srun_returns_when_a_node_is_lost_is_not_the_end_of_the_job(
    folder: Path, configuration: Path
) -> None:
    spec = JobSpec(name="j", command=("bash", "-c", "touch up; sleep 60"), folder=folder)
    job = _submitted(spec, ("j",))
    until((folder / "up").exists, every=0.3)
    node = _slurm("squeue", "--noheader", f"--jobs={job.native}", "--format=%N")
    lost = int(configuration.with_name(f"{node}.pid").read_text())
    suspend(lost)
    try:
        _slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        record = job.folder / slurm_script.ATTEMPTS
        until(lambda: "exit code" in record.read_text(), every=0.3)
        assert "Node failure" in _written(folder)
        assert record.read_text().endswith(" exit code 75\n")
        assert _slurm("squeue", "--noheader", f"--jobs={job.native}", "--format=%T") == "PENDING"
    finally:
        os.kill(lost, signal.SIGCONT)
        _slurm("scancel", job.native)
        _slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


def _stored(s3: str, url: str) -> dict[str, str]:
    """What a store has of a runs folder, by key."""
    prefix = url.removeprefix("s3://bucket/") + "/"
    client = boto3.client(
        "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    listed = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    keys = [about["Key"] for about in listed]
    read = {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(prefix): content.decode(errors="replace") for key, content in read.items()}


def test_what_nodes_write_to_its_end_is_seen_where_there_is_neither_their_disk_nor_slurm(
    stoker: Command, start: Start, folder: Path, tmp_path: Path, s3: str, proxy: servers.Proxy
) -> None:
    """The store takes no logs for a while, which costs nothing; secrets do not get there."""
    url = f"s3://bucket/{uuid.uuid4().hex}"
    nodes, elsewhere = {"STOKER_CACHE": str(tmp_path / "nodes")}, {"STOKER_CACHE": str(tmp_path / "mine")}
    elsewhere["PATH"] = str(tmp_path)
    proxy._only = lambda method, path: method == "PUT" and "/logs/node-" in path
    proxy.mode, proxy.left = "503", 2
    begin = "    x = torch.randn"
    tells = "    print('key', __import__('os').environ['AWS_SECRET_ACCESS_KEY'], flush=True)\n"
    waits = "            time.sleep(0.02)\n"
    slow = f"{waits}        if run.attempt.stop.requested is not None:\n            time.sleep(2)\n"
    (folder / "tells.py").write_text(
        Path(RECIPE).read_text().replace(begin, tells + begin).replace(waits, slow)
    )
    asked = ("train", "tells.py", *SAME[2:], "--nodes", "2", "--name", "b", "--on", "slurm", "--runs", url)
    done = stoker(*asked, "waits=[20]", "--json", env=nodes, cwd=folder)
    assert done.code == 0, done.err
    logs = ("jobs", "logs", "b", "--runs", url)
    followed = start(*logs, "--follow", env=elsewhere, cwd=folder, cold=True)
    awaited = {"is machine 0 of 2", "b  step ", "[node ", "[rank 0] ", "[rank 1] ", "key [REDACTED]"}
    for line in followed.stdout:
        awaited -= {known for known in awaited if known in line.decode()}
        if not awaited:
            break
    assert not awaited, followed.communicate()[1].decode()
    assert proxy.seen["503"] == 2

    (run,) = (tmp_path / "nodes").glob("stores/*/bucket/*/tells/b")
    until(lambda: _at(run, 19), every=0.3)
    assert [attempt.world for attempt in loaded(run).attempts] == [2]
    assert stoker("jobs", "cancel", "b", "--now", "--runs", url, env=nodes, cwd=folder).code == 0
    assert _over(done.answer["native"]) == "CANCELLED"
    out, err = followed.communicate(timeout=90)  # less than it waits for one that cannot say that it ended
    assert followed.returncode == 0, err.decode()
    assert "tells/b preempted at step 20" in out.decode()
    assert "tells/b preempted at step 20" in stoker(*logs, env=elsewhere, cwd=folder).out
    one = stoker(*logs, "--rank", "1", env=elsewhere, cwd=folder).out.splitlines()
    assert one
    assert all(line.startswith("[rank 1] ") for line in one)
    listed = stoker("jobs", "list", "--runs", url, "--json", env=elsewhere, cwd=folder)
    assert listed.answer["jobs"][0]["step"] == 20, listed.err
    there = _stored(s3, url)
    assert not [key for key, content in there.items() if SECRET in content]
    (job,) = (tmp_path / "nodes").glob("stores/*/bucket/*/.jobs/*")
    for name in ("attempts.txt", "node-0.log", "node-1.log", "slurm.log"):
        stretches = [there[key] for key in sorted(there) if f"/logs/{name}/" in key]
        assert "".join(stretches) == (job / name).read_text().replace(SECRET, "[REDACTED]")


def _in_store(folder: Path, attempts: str, cancelled: bool) -> tuple[jobs.Job, job_uploader.JobLogs]:
    """A job that Slurm does not know, with what is brought to the store of what it wrote of its attempts."""
    runs = object_store.working_copy(f"s3://bucket/{uuid.uuid4().hex}")
    store = object_store.of(runs)
    assert store is not None
    job = jobs.planned("slurm", JobSpec(name="a", command=("python",), folder=folder), runs, ("ranked/a",))
    (jobs.begin(job, "attempts.txt", attempts).parent / "logs").mkdir()
    jobs.write(dataclasses.replace(job, native="999999", cancelled=cancelled))
    there = job_uploader.JobLogs(job.folder, store)
    there.push()
    return job, there


@pytest.mark.parametrize(
    ("written", "cancelled", "state"),
    [
        ("n1 begins\nn1 exit code 75\nn2 begins\nn2 exit code 0\n", False, "done"),
        ("n1 begins\nn1 exit code 3\n", False, "failed"),
        ("n1 begins\nn1 exit code 75\n", True, "cancelled"),
        ("n1 begins\nn1 exit code 75\nn2 begins\n", False, "unknown"),
        ("", True, "cancelled"),
        ("", False, "unknown"),
    ],
)
def test_how_a_job_was_that_slurm_has_forgotten_is_read_in_the_store_where_the_disk_is_not(
    written: str, cancelled: bool, state: str, stoker: Command, tmp_path: Path, proxy: servers.Proxy
) -> None:
    job, _ = _in_store(tmp_path, written, cancelled)
    elsewhere = {"STOKER_CACHE": str(tmp_path / "elsewhere")}
    listed = stoker("jobs", "list", "--runs", finding.shown(job.runs), "--json", env=elsewhere)
    assert [known["state"] for known in listed.answer["jobs"]] == [state], listed.err


@pytest.mark.parametrize(
    ("written", "cancelled", "state", "reason"),
    [
        ("n1 begins\nn1 exit code 75\nn2 begins\nn2 exit code 0\n", False, "done", None),
        ("n1 begins\nn1 exit code 3\n", False, "failed", "exit code 3"),
        ("n1 begins\nn1 exit code 75\n", True, "cancelled", None),
        ("", True, "cancelled", None),
        ("n1 begins\nn1 exit code 75\n", False, "unknown", "slurm does not answer"),
        ("n1 begins\n", False, "unknown", "slurm does not answer"),
        ("", False, "unknown", "slurm does not answer"),
    ],
)
def test_how_a_job_ended_is_known_from_the_store_where_slurms_commands_are_not(
    written: str,
    cancelled: bool,
    state: str,
    reason: str | None,
    stoker: Command,
    tmp_path: Path,
    proxy: servers.Proxy,
) -> None:
    job, _ = _in_store(tmp_path, written, cancelled)
    elsewhere = {"STOKER_CACHE": str(tmp_path / "elsewhere"), "PATH": str(tmp_path)}
    listed = stoker("jobs", "list", "--runs", finding.shown(job.runs), "--json", env=elsewhere)
    assert [(known["state"], known["reason"]) for known in listed.answer["jobs"]] == [(state, reason)]
    assert "squeue not found" in listed.err


def test_an_array_is_over_once_each_element_has_written_that_it_is(tmp_path: Path) -> None:
    spec = JobSpec(name="a", command=("python",), folder=tmp_path, elements=2)
    job = jobs.planned("slurm", spec, tmp_path / "runs", ("a-0", "a-1"))
    jobs.begin(job, f"{slurm_script.ATTEMPTS}.0", "n1 begins\nn1 exit code 0\n")
    assert slurm_jobs.ended([job]) == {}
    (job.folder / f"{slurm_script.ATTEMPTS}.1").write_text("n2 begins\nn2 exit code 1\n")
    assert slurm_jobs.ended([job])[job.id] == ("failed", "1 failed, 1 done")


@pytest.mark.soak(small=False)
def test_a_job_that_was_cancelled_and_killed_is_followed_until_nothing_more_comes(
    tmp_path: Path, proxy: servers.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its script could not say that it ended."""
    monkeypatch.setattr(slurm_jobs, "_QUIET", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    job, there = _in_store(tmp_path, "n1 begins\n", cancelled=True)
    assert list(slurm_jobs.lines(job, follow=True)) == []
    (job.folder / "slurm.log").write_text("begins\n")
    there.push()
    assert [line.text for line in slurm_jobs.lines(job, follow=True)] == ["begins"]


def test_a_job_that_fails_is_started_again_as_often_as_was_asked_for(stoker: Command, folder: Path) -> None:
    (folder / "fails.py").write_text('def train(run):\n    raise RuntimeError("each time")\n')
    asked = ("--on", "slurm", "--retries", "1", "--name", "e", "--json")
    number = stoker("train", "fails.py", *asked, cwd=folder).answer["native"]
    assert _over(number) == "FAILED"
    assert len(loaded(folder / "runs" / "fails" / "e").attempts) == 2
    shown = stoker("jobs", "list", "--json", cwd=folder).answer["jobs"][0]
    assert shown["state"] == "failed"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--gpus", "3"), "--gpus 3: a node of the default partition has at most 2"),
        (("--memory", "64GB"), "--memory 64G: a node of the default partition has at most 2000M"),
        (("--nodes", "4"), "--nodes 4: the default partition has 2 nodes with the requested resources"),
        (("--time", "1h", "--option", "partition=short"), "a job of partition short may take 5min"),
        (("--option", "partition=nope"), "invalid partition specified: nope"),
        (("--option", "clusters=other"), "submit from a login node of the other cluster"),
        (("--option", "cluster=other"), "Slurm would read it as clusters"),
        (("--option", "nosuch=1"), "unrecognized option '--nosuch=1'"),
    ],
)
def test_what_slurm_can_never_run_is_refused_before_anything_is_written(
    asked: tuple[str, ...], said: str, stoker: Command, folder: Path
) -> None:
    done = stoker(*SAME, "--on", "slurm", *asked, cwd=folder)
    assert done.code == 2
    assert said in done.err
    assert not list(folder.iterdir())


def test_a_partition_that_is_down_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = JobSpec(name="i", command=("true",), folder=folder, options={"partition": "down"})
    slurm_jobs.check(jobs.planned("slurm", spec, folder / "runs", ("i",)))
    assert "partition down is down: the job waits until it is up again" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SBATCH_CLUSTERS", "other", "SBATCH_CLUSTERS is set"),
        ("SLURM_CONF", "/nonexistent", "SLURM_CONF=/nonexistent: no such file, so Slurm has no"),
    ],
)
def test_a_job_does_not_go_to_another_cluster_or_to_none_by_a_variable(
    name: str, value: str, said: str, stoker: Command, folder: Path
) -> None:
    done = stoker(*SAME, "--on", "slurm", env={name: value}, cwd=folder)
    assert done.code == 2
    assert said in done.err
    assert not list(folder.iterdir())


@pytest.mark.soak(small=False)
def test_a_job_of_which_slurm_says_nothing_is_not_over(
    stoker: Command, start: Start, folder: Path, configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*SAME, "waits=[20]", "--name", "a", "--on", "slurm")
    done = stoker(*asked, "--json", cwd=folder)
    assert done.code == 0, done.err
    until(lambda: _state(done.answer["native"]) == "RUNNING", every=0.3)
    settings = dict(line.split("=", 1) for line in configuration.read_text().splitlines() if "=" in line)
    lost = configuration.with_name("lost.conf")
    elsewhere = {"SlurmctldPort": str(servers.free_port()), "MessageTimeout": "2"}
    text = configuration.read_text()
    for name, value in elsewhere.items():
        text = text.replace(f"{name}={settings[name]}\n", f"{name}={value}\n")
    lost.write_text(text)
    with monkeypatch.context() as of_others:
        of_others.setenv("SLURM_CONF", str(lost))
        listed = stoker("jobs", "list", cwd=folder)
        assert listed.code == 0
        assert "unknown (slurm does not answer)" in listed.out
        cancelled = stoker("jobs", "cancel", "a", cwd=folder)
        assert cancelled.code == 1
        assert "Slurm does not answer: " in cancelled.err
        assert stoker(*asked, cwd=folder).code != 0
        followed = start("jobs", "logs", "a", "--follow", cwd=folder)
        time.sleep(4)  # it asks every 2 s
        assert followed.poll() is None
        followed.kill()
    assert _state(done.answer["native"]) == "RUNNING"
    assert stoker("jobs", "cancel", "a", "--now", cwd=folder).code == 0


@pytest.mark.soak
@pytest.mark.skipif(servers.postgres_binaries() is None, reason="PostgreSQL is not installed")
@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy
def test_a_sweep_is_an_array_of_controllers_of_one_study(
    stoker: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = servers.postgres_binaries()
    assert binaries is not None
    slow = ("pause=10", f"until={folder / 'go'}")  # a trial under way sees the file after its pause
    given = ("sweep", SEARCHED, "x=uniform(0, 1)", *slow, "--sampler", "random", "--trials", "6")
    with servers.postgres(binaries) as url:
        monkeypatch.setenv("STOKER_STORAGE", url)
        done = stoker(*given, "--name", "s", "--on", "slurm", "--controllers", "2", "--json", cwd=folder)
        assert done.code == 0, done.err
        number = done.answer["native"]
        until(lambda: len(list(folder.glob("runs/s-*/trial-*/run.json"))) >= 2)
        # As where its node is taken. Slurm has the last element under the number of the whole array.
        (job,) = folder.glob("runs/.jobs/*/job.json")
        for element in (0, 1) if SOAK else (1,):
            _slurm("scancel", "--signal=TERM", f"{number}_{element}")
            attempts = job.with_name(f"{slurm_script.ATTEMPTS}.{element}")
            until(lambda file=attempts: file.read_text().endswith(" exit code 75\n"))
        (folder / "go").touch()  # without which it would go on for minutes
        assert _over(number) == "COMPLETED", _written(folder)
        found = json.loads(stoker("jobs", "show", number, "--json", cwd=folder).out)
        assert (found["state"], found["runs"]) == ("done", ["s-0", "s-1"])
    trials = sorted(file.parent for file in folder.glob("runs/s-*/trial-*/run.json"))
    assert {trial.parent.name for trial in trials} == {"s-0", "s-1"}
    assert len(trials) == 6
    assert all(loaded(trial).status == "finished" for trial in trials)
    assert url not in _written(folder)
    assert shlex.quote(url) not in next(folder.glob("runs/.jobs/*/script.sh")).read_text()
