"""What brings a job's logs to its store: a real process beside those that write them, and a real S3."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest
import s3fs
from stoker import object_store
from stoker.launch import job_uploader, tail
from stoker.launch.jobs import Job
from stoker.launch.jobspec import JobSpec
from stoker.object_store import Unreachable
from stoker.run import stretches

from commands import SECRET
from servers import Proxy
from support import LONG, until

Begin = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def job(proxy: Proxy) -> Job:
    """A job whose runs are in an object store, in the working copy of its nodes."""
    runs = object_store.working_copy(f"s3://bucket/{uuid.uuid4().hex}")
    spec = JobSpec(name="a", command=("python",), folder=runs)
    made = Job(id="20261126-111500-3f9a", target="slurm", spec=spec, runs=runs, trains=("ranked/a",))
    made.folder.mkdir(parents=True)
    return made


@pytest.fixture
def begin(job: Job) -> Iterator[Begin]:
    """Start an uploader; its standard input is to be closed by the test."""
    processes = []

    def started(patience: float = LONG) -> subprocess.Popen[bytes]:
        flags = ("--patience", str(patience))
        command = [sys.executable, "-P", "-m", job_uploader.__name__, *flags, str(job.folder)]
        # In a session of its own: within that of pytest it would wait for all others, as it is so nice.
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def _there(job: Job, name: str) -> str:
    """What the store has of a log."""
    store = object_store.of(job.runs)
    assert store is not None
    base = f".jobs/{job.id}/logs"
    of_file = stretches.known(base, store.objects(base)).get(name, [])
    return b"".join(stretches.read(store, base, name, of_file, 0)).decode()


def _write(job: Job, name: str, text: str) -> None:
    with (job.folder / name).open("a") as file:
        file.write(text)


def test_one_that_is_killed_leaves_what_it_brought_and_the_next_one_goes_on(job: Job, begin: Begin) -> None:
    _write(job, "node-0.log", f"begins with {SECRET}\nhalf a li")
    first = begin()
    until(lambda: _there(job, "node-0.log") == "begins with [REDACTED]\n", every=0.2)
    first.kill()
    first.wait()
    copy = job.folder / "logs" / "node-0.log"
    copy.write_text(copy.read_text() + "half")  # as where it is killed within a write
    _write(job, "node-0.log", "ne\nends\n")
    _write(job, "attempts.txt", "2026-11-26T11:15:00 n1 exit code 0\n")
    second = begin()
    second.communicate(timeout=LONG)
    assert second.returncode == 0
    assert _there(job, "node-0.log") == "begins with [REDACTED]\nhalf a line\nends\n"
    assert _there(job, "attempts.txt") == (job.folder / "attempts.txt").read_text()


@pytest.mark.soak(small=False)
def test_a_secret_of_several_lines_does_not_get_there_and_what_follows_is_there_once(
    job: Job, begin: Begin
) -> None:
    key = ["-----BEGIN RSA PRIVATE KEY-----", *("MIIEpAIBAAKCAQEA" * 4,) * 3, "-----END RSA PRIVATE KEY-----"]
    _write(job, "node-0.log", "\n".join(["begins", *key, "goes on", ""]))
    for ends in ("preempted\n", "ends\n"):  # the second one finds the copy of the first
        begin().communicate(timeout=LONG)
        _write(job, "node-0.log", ends)
    begin().communicate(timeout=LONG)
    there = _there(job, "node-0.log")
    assert "MIIEpA" not in there
    assert [line for line in there.splitlines() if line in ("begins", "goes on", "preempted", "ends")] == [
        "begins", "goes on", "preempted", "ends"
    ]  # fmt: skip
    assert there.count("\n") == (job.folder / "node-0.log").read_text().count("\n")


@pytest.mark.soak(small=False)
def test_one_outlives_the_signals_that_are_meant_for_those_that_train(job: Job, begin: Begin) -> None:
    _write(job, "node-0.log", "begins\n")
    process = begin()
    until(lambda: _there(job, "node-0.log") == "begins\n", every=0.2)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    _write(job, "node-0.log", "preempted\n")
    process.communicate(timeout=LONG)
    assert process.returncode == 0
    assert _there(job, "node-0.log") == "begins\npreempted\n"


def test_a_store_that_seemed_to_fail_gets_all_of_it_once(
    job: Job, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did what it was asked for, and the answer was lost."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own, with ever longer pauses
    store = object_store.of(job.runs)
    assert store is not None
    (job.folder / "logs").mkdir()
    there = job_uploader.JobLogs(job.folder, dataclasses.replace(store, patience=0.0))
    _write(job, "node-0.log", "begins\n")
    there.push()
    proxy.mode = "lost"
    _write(job, "node-0.log", "lost\n")
    with pytest.raises(Unreachable):
        there.push()
    there.forget()
    proxy.mode = "ok"
    _write(job, "node-0.log", "ends\n")
    there.push()
    assert _there(job, "node-0.log") == "begins\nlost\nends\n"


def test_a_store_that_stays_away_does_not_keep_a_job(job: Job, proxy: Proxy, begin: Begin) -> None:
    proxy._only, proxy.mode = lambda method, path: True, "hang"
    _write(job, "node-0.log", "begins\n")
    process = begin(patience=1)
    process.communicate(timeout=LONG)
    assert process.returncode == 1


def test_a_log_that_grows_elsewhere_is_read_in_the_store_and_joined_stretches_are_no_gap(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who looks shares no disk with those who write."""
    monkeypatch.setattr(tail, "ASKED", 0.0)
    store = object_store.of(job.runs)
    assert store is not None
    nodes = job.folder.parent / "nodes" / job.id
    (nodes / "logs").mkdir(parents=True)
    there = job_uploader.JobLogs(nodes, store)
    (nodes / "node-0.log").write_text("")
    count, written = 0, 40

    def over() -> bool:
        nonlocal count
        count += 1
        with (nodes / "node-0.log").open("a") as file:
            file.write(f"line {count}\n")
        there.push()
        steps = "".join(f"step {n}\n" for n in range(1, count + 1))
        store.write("ranked/a/logs/rank-0.log", steps.encode())
        return count == written

    monkeypatch.setattr(tail, "_EVERY", 0.0)
    logs = tail.Logs(job, nodes=True)
    said = list(tail.lines(logs, logs.until(over)))
    lines = range(1, written + 1)
    assert [line.text for line in said if line.source == "node 0"] == [f"line {n}" for n in lines]
    assert [line.text for line in said if line.source == "rank 0"] == [f"step {n}" for n in lines]
