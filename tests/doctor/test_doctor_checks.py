"""Each check beside what it is to find: real servers, real file systems, real processes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import psutil
import pytest
import torch
from stoker import machine, object_store, threads
from stoker.doctor import checks, folders, gpus, hardware, hub, launchers, meeting, software, trackers
from stoker.doctor.checks import Check
from stoker.doctor.findings import Finding, ok
from stoker.doctor.gpus import Driver
from stoker.object_store import Store

import hub_server
from commands import SECRET, Point
from servers import Proxy, free_port, listening, mlflow_server
from support import LONG, until

NO_GPU = pytest.mark.skipif(bool(machine.visible_gpus()), reason="this machine has a GPU")
ONE = "import sys; from stoker.doctor import {0}; [print(f.state, f.text) for f in {0}.{1}(*sys.argv[1:])]"


def problems(found: Iterator[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.state == "problem"]


def ran(command: list[str], module: str, function: str = "check", *arguments: str) -> str:
    """What a check says in a process that a command begins; the test is skipped where that may not be."""
    code = ONE.format(module, function)
    done = subprocess.run(
        [*command, sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if "not permitted" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"no right to {command[0]}: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- how a check is made ---------------------------------------------------------------------


def test_a_check_that_hangs_is_given_up_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, over, begun = threading.Event(), threading.Event(), threads.begun

    def hanging() -> Iterator[Finding]:
        yield ok("before")
        hangs.set()
        over.wait()

    def no_sooner(work: Callable[[], Any], name: str) -> Any:
        """So that the little time that it has begins when it hangs, or has found what it finds before."""
        future = begun(work, name)
        until(lambda: future.done() or hangs.is_set())
        return future

    monkeypatch.setattr(threads, "begun", no_sooner)
    before, after = checks.made(Check("a", hanging, limit=0.2, hint="look at the disk"))
    over.set()
    assert before == ok("before")
    assert (after.state, after.text) == ("problem", "no answer within 0 s: look at the disk")


@pytest.mark.parametrize("limit", [None, LONG])
def test_a_check_that_fails_is_a_finding_without_secrets(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)

    def failing() -> Iterator[Finding]:
        yield ok(f"to http://me:{SECRET}@host")
        raise TimeoutError(f"it did not take {SECRET}")

    found = list(checks.made(Check("a", failing, limit=limit)))
    assert [finding.state for finding in found] == ["ok", "problem"]
    assert "TimeoutError: it did not take" in found[1].text
    assert SECRET not in str(found)


# -- software --------------------------------------------------------------------------------


def _installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_and_extras_are_those_of_the_metadata() -> None:
    first, extras, *_ = [finding.text for finding in software.check()]
    assert f"torch {torch.__version__}" in first
    assert f"s3 (s3fs {software.version('s3fs')})" in extras
    assert not problems(software.check())


def test_a_package_of_another_version_is_a_problem_and_an_extras_is_one_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(tmp_path, "transformers", "4.57.0")
    _installed(tmp_path, "s3fs", "2024.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = problems(software.check())
    assert problem.startswith("transformers 4.57.0, but stoker needs transformers")
    assert "pip install 'transformers" in problem
    (note,) = [finding.text for finding in software.check() if finding.state == "note"]
    assert "s3" in note.partition(":")[2]
    assert "(s3fs 2024.1.0)" in note


# -- the machine -----------------------------------------------------------------------------


def test_few_open_files_are_said_with_the_limit_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        (problem,) = [text for text in problems(hardware.check()) if "files" in text]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        (note,) = [finding.text for finding in hardware.check() if "files" in finding.text]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "400 files" in problem
    assert f"`ulimit -n {min(hard, 65536)}`" in problem
    assert "1,024 files" in note


def test_shared_memory_as_docker_gives_it_is_too_little() -> None:
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    (said,) = [line for line in ran(small, "hardware").splitlines() if "/dev/shm" in line]
    assert said.startswith("problem /dev/shm has 64.0 MiB")
    assert "--shm-size" in said


@pytest.mark.parametrize("version", [1, 2])
def test_limits_are_the_lowest_of_the_cgroup_and_those_above_it(version: int, tmp_path: Path) -> None:
    names = {
        1: ("4:memory:/job/step\n3:cpu,cpuacct:/job\n1:name=systemd:/\n", "memory", "cpu,cpuacct"),
        2: ("0::/job/step\n", "", ""),
    }
    membership, memory, cpu = names[version]
    (tmp_path / "cgroup").write_text(membership)
    for folder in (tmp_path / memory / "job" / "step", tmp_path / cpu / "job"):
        folder.mkdir(parents=True, exist_ok=True)
    if version == 1:
        (tmp_path / "memory" / "job" / "step" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("1048576\n")
        (tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us").write_text("150000\n")
        (tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
        (tmp_path / "job" / "memory.max").write_text("1048576\n")
        (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
        (tmp_path / "job" / "cpu.max").write_text("150000 100000\n")
    assert machine.limits(tmp_path / "cgroup", tmp_path) == (1.5, 1048576)
    assert machine.limits(tmp_path / "none", tmp_path) == (None, None)


@pytest.mark.parametrize(
    ("ephemeral", "ports"),
    [
        ("32768\t60999\n", range(10_000, 20_000)),
        ("15000\t61000\n", range(10_000, 15_000)),
        ("1024\t65535\n", range(1024, 65_536)),
        (None, range(1024, 65_536)),
    ],
)
def test_a_free_port_is_one_that_the_system_gives_to_nobody_else(
    ephemeral: str | None, ports: range, tmp_path: Path
) -> None:
    if ephemeral is not None:
        (tmp_path / "range").write_text(ephemeral)
    random.seed(0)
    before = random.getstate()
    found = {machine.free_port(tmp_path / "range") for _ in range(100)}
    assert len(found) == 100
    assert all(port in ports for port in found)
    assert random.getstate() == before


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: [taken])
        assert machine.free_port() != taken


def test_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("there is one core")
    monkeypatch.delenv("OMP_NUM_THREADS")
    os.sched_setaffinity(0, {min(mine)})
    try:
        first, *others = [finding.text for finding in hardware.check()]
    finally:
        os.sched_setaffinity(0, mine)
    assert f"1 core of {os.cpu_count()}" in first
    assert any("export OMP_NUM_THREADS=1" in text for text in others)


# -- GPUs ------------------------------------------------------------------------------------


@NO_GPU
def test_a_gpu_beside_a_torch_for_the_cpu_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    fake.chmod(0o755)
    assert not problems(gpus.check())
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (problem,) = problems(gpus.check())
    assert (
        "there is a GPU (NVIDIA H100 80GB HBM3), but torch is built for the CPU: install a build" in problem
    )


@NO_GPU
def test_without_a_gpu_what_the_cpu_does_is_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    (finding,) = [finding for finding in gpus.check() if "no GPU" in finding.text]
    assert "times as fast as fp32" in finding.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("built_for", "cuda", "visible", "state", "said"),
    [
        (
            "13.0",
            "12.2",
            None,
            "problem",
            "is too old: it supports CUDA 12.2, but torch is built for CUDA 13.0",
        ),
        (None, "12.2", None, "problem", "install a build for CUDA 12.2 or older"),
        ("12.8", "12.2", "", "note", "CUDA_VISIBLE_DEVICES='' hides the GPUs (A, B and 1 more)"),
    ],
)
def test_why_torch_does_not_reach_gpus(
    built_for: str | None, cuda: str, visible: str | None, state: str, said: str
) -> None:
    found = gpus.why_not(Driver(("A", "B", "C"), "535.104", cuda), built_for, visible)
    assert found.state == state
    assert said in found.text


def test_a_gpu_without_a_driver_is_seen_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not gpus._on_bus(tmp_path)  # another vendor's, and the sound of one
    (tmp_path / "1" / "class").write_text("0x030200\n")
    assert gpus._on_bus(tmp_path)


# -- ranks -----------------------------------------------------------------------------------


def test_ranks_that_take_too_long_are_ended_with_all_they_started(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("STOKER_TEST_MARK", mark)
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        found = meeting.meet("gloo", 2, limit=1.0)
        assert not list(Path(folder).iterdir())
    assert found.state == "problem"
    assert "did not connect within 1 s: set GLOO_SOCKET_IFNAME" in found.text
    assert not [p.pid for p in psutil.process_iter() if p.pid != os.getpid() and _has(p, mark)]


STARTS_ANOTHER_AND_ANOTHER = """
import os, time
print(flush=True)
for _ in range(1000):
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
time.sleep(600)
"""


def test_what_is_started_while_its_family_is_ended_is_ended_too() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS_ANOTHER_AND_ANOTHER],
        env={**os.environ, "STOKER_TEST_MARK": mark}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as told:
        told.readline()
        meeting._end(process)
    left = [p for p in psutil.process_iter() if _has(p, mark)]
    for one in left:
        one.kill()
    assert not left


def test_a_path_that_is_too_long_for_sockets_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    found = meeting.meet("gloo", 2, limit=LONG)
    assert (found.state, "set TMPDIR to a folder with a shorter path" in found.text) == ("problem", True)


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("STOKER_TEST_MARK") == mark
    except psutil.Error:
        return False


# -- folders ---------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk mounted with some options, and again with others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"no right to mount a disk: {done.stderr.decode()}")
        return folder

    yield mount
    while os.path.ismount(folder):  # each lies upon the one before
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


def test_a_runs_folder_is_tried_where_it_would_be_made(tmp_path: Path) -> None:
    found = list(folders.runs(str(tmp_path / "a" / "runs")))
    assert not problems(iter(found))
    assert f"{tmp_path / 'a' / 'runs'} is writable, on a local disk, locks work" in found[0].text
    assert "is on disk after" in found[1].text
    assert not list(tmp_path.iterdir())


def test_a_runs_folder_that_cannot_be_written_is_a_problem(
    tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    (tmp_path / "file").touch()
    (problem,) = problems(folders.runs(str(tmp_path / "file" / "runs")))
    assert f"(Not a directory, of {tmp_path / 'file'}): set --runs, or STOKER_RUNS" in problem
    (problem,) = problems(folders.runs(str(disk("size=512k"))))
    assert "(No space left on device)" in problem
    (problem,) = problems(folders.runs(str(disk("size=5m"))))
    assert "5.0 MiB free, too little for a checkpoint" in problem
    (problem,) = problems(folders.runs(str(disk("ro"))))
    assert "(Read-only file system)" in problem


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("answer", "reason"), [("error=ENOLCK", "No locks available"), ("retval=0", "a second lock was granted")]
)
def test_a_file_system_without_locks_is_a_problem(answer: str, reason: str, tmp_path: Path) -> None:
    """The kernel is made to answer as such a file system does."""
    without = ["strace", "-qq", "-o", "/dev/null", "-e", f"inject=flock:{answer}"]
    said = ran(without, "folders", "runs", str(tmp_path)).splitlines()[0]
    assert said.startswith(f"problem locks do not work in {tmp_path} ({reason})")
    assert not list(tmp_path.iterdir())


def test_caches_and_temporary_files_that_cannot_be_written_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not problems(folders.others())
    (tmp_path / "file").touch()
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    cache, temporary = problems(folders.others())
    assert cache.startswith("stoker's cache:")
    assert "set STOKER_CACHE" in cache
    assert "set TMPDIR" in temporary


def _objects() -> list[str]:
    return list(Store("s3://bucket/doctor", "").objects())


def test_an_object_store_is_used_and_left_as_it_was(proxy: Proxy, cache: Path) -> None:
    before = sorted(cache.rglob("*"))
    (finding,) = folders.runs("s3://bucket/doctor/")
    assert finding.state == "ok"
    assert "s3://bucket/doctor: write, list, read and delete work" in finding.text
    assert not _objects()
    assert tuple(m for m in ("PUT", "DELETE") if m in {method for method, _ in proxy.log}) == (
        "PUT",
        "DELETE",
    )
    assert sorted(cache.rglob("*")) == before  # nor is a working copy begun


def test_an_object_store_that_refuses_is_a_problem(
    s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.mode = "403"
    (problem,) = problems(folders.runs("s3://bucket/doctor"))
    assert "provide credentials that allow listing, reading, writing and deleting" in problem
    (problem,) = problems(folders.runs("s3://nowhere/doctor"))
    assert SECRET not in problem
    proxy.mode = "ok"
    (problem,) = problems(folders.runs("s3://nowhere/doctor"))
    assert "the bucket does not exist: create it, or correct --runs" in problem
    (problem,) = problems(folders.runs("s3://me:pw@bucket/doctor"))
    assert "leave credentials out of the URL" in problem
    once = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", once)
    object_store._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    (problem,) = problems(folders.runs("s3://bucket/doctor"))
    assert "Could not connect" in problem
    assert "AWS_ENDPOINT_URL" in problem


# -- trackers --------------------------------------------------------------------------------


def test_sinks_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "STOKER_SINKS=none" in next(trackers.check("runs")).text
    monkeypatch.setenv("STOKER_SINKS", "wandb,tensorbord,tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb, unknown, board = trackers.check("runs")
    assert wandb.text == "STOKER_SINKS names wandb, which is not installed: pip install 'stoker[wandb]'"
    assert "did you mean 'tensorboard'?" in unknown.text
    assert (board.state, wandb.state, unknown.state) == ("ok", "problem", "problem")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_mlflow_servers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    monkeypatch.setattr(trackers, "_ANSWER", LONG)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # the check sets them for its process
    (found,) = trackers.check("some/runs")
    assert "the embedded store in some/runs/mlflow.db" in found.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    (found,) = trackers.check("runs")
    assert found.state == "problem"
    assert "([Errno 111] Connection refused): start the server, or correct MLFLOW_TRACKING_URI" in found.text
    assert SECRET not in found.text
    with mlflow_server(tmp_path / "server") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        (found,) = trackers.check("runs")
        assert (found.state, found.text.endswith(f"to {url}, which answers")) == ("ok", True)
    refusing = Proxy(url, required="Basic nobody")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing.url)
    (found,) = trackers.check("runs")
    refusing.close()
    assert found.state == "problem"
    assert "set MLFLOW_TRACKING_USERNAME" in found.text


def _http(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def test_wandb_is_asked_whether_it_knows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_SINKS", "wandb")
    monkeypatch.setattr(trackers, "_ANSWER", LONG)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (found,) = trackers.check("runs")
    assert found.state == "note"
    assert "offline as there is no API key" in found.text
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    answers = {
        _http("200 OK", b'{"data": {"viewer": {"username": "me"}}}'): ("ok", "which accepts the key"),
        _http("200 OK", b'{"data": {"viewer": null}}'): ("problem", "rejects the key"),
        _http("401 Unauthorized", b"no"): ("problem", "rejects the key"),
        _http("200 OK", b"<html>"): ("problem", "does not answer like W&B"),
        b"": ("problem", "does not answer ("),
    }
    for answer, (state, said) in answers.items():
        with listening(answer) as where:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://{where}")
            (found,) = trackers.check("runs")
        assert (found.state, said in found.text) == (state, True), found.text
        assert SECRET not in found.text
    monkeypatch.setenv("WANDB_MODE", "offline")
    (found,) = trackers.check("runs")
    assert (found.state, "offline: each run keeps its files" in found.text) == ("ok", True)


# -- the hub, and launchers ------------------------------------------------------------------


def test_the_hub_is_asked_whether_it_knows_the_token(
    point_at: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_ANSWER", LONG)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serving() as served:
        point_at(served.url)
        (found,) = hub.check()
        assert (found.state, f"{served.url} answers; no token is set" in found.text) == ("ok", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        (found,) = hub.check()
        assert (found.state, "accepts the token" in found.text) == ("ok", True)
        assert hub_server.TOKEN not in found.text
        monkeypatch.setenv("HF_TOKEN", SECRET)
        (found,) = hub.check()
        assert (found.state, "rejects the token: set HF_TOKEN" in found.text) == ("problem", True)
    point_at(f"http://127.0.0.1:{free_port()}")
    (found,) = hub.check()
    assert (found.state, "set HF_HUB_OFFLINE=1 if" in found.text) == ("problem", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (found,) = hub.check()
    assert (found.state, found.text.startswith("HF_HUB_OFFLINE is set")) == ("note", True)


def test_clusters_that_can_be_asked_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(launchers, "_ANSWER", LONG)
    (found,) = launchers.check()
    assert found == ok("no client for slurm, ray, kubernetes, needed only for --on slurm|ray|kubernetes")
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho yes\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(launchers, "_CLIENTS", {**launchers._CLIENTS, "slurm": lambda: None})
    first, _ = launchers.check()
    assert first == ok("--on kubernetes: a cluster answers, and would accept a job")
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(launchers, "_ANSWER", 0.2)
    first, _ = launchers.check()
    assert (first.state, "no answer within 0 s" in first.text) == ("note", True)
    for child in psutil.Process().children():
        if child.name() == "sleep":
            child.kill()


def test_what_started_this_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_CLIENTS", dict.fromkeys(launchers._CLIENTS, lambda: None))
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    job, rank, _ = [finding.text for finding in launchers.check()]
    assert job == "this process runs in Slurm job 12, on node 1 of 2"
    assert rank.startswith("this process is rank 3 of 4")
