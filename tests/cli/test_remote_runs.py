"""Runs in an object store: a real S3 over HTTP, trained on one machine and gone on with on another."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from stoker.checkpoint import manifest
from test_launch import RECIPE, SLOW, _weights

from commands import SECRET, Command, Start
from servers import Proxy
from support import LONG, SOAK, loaded, slow_from, until, wait_for_points

SHORT = (*SLOW, "steps=80")
Objects = Callable[[], dict[str, int]]


@pytest.fixture
def url() -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def machine(tmp_path: Path, proxy: Proxy) -> Callable[[str], dict[str, str]]:
    """The environment of a machine with a disk of its own."""

    def environment(name: str) -> dict[str, str]:
        return {"STOKER_CACHE": str(tmp_path / name)}

    return environment


@pytest.fixture
def bucket(s3: str) -> Any:
    """The bucket, as an operator reaches it."""
    import boto3

    return boto3.resource(
        "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    ).Bucket("bucket")


@pytest.fixture
def objects(bucket: Any, url: str) -> Objects:
    """The sizes of what is in the store, by key below the runs folder."""
    prefix = url.removeprefix("s3://bucket/") + "/"
    return lambda: {o.key.removeprefix(prefix): o.size for o in bucket.objects.filter(Prefix=prefix)}


def _copy(tmp_path: Path, machine: str, url: str, run: str = "a") -> Path:
    """The working copy of a run on a machine."""
    (server,) = (tmp_path / machine / "stores").iterdir()
    return server / url.removeprefix("s3://") / "ranked" / run


def _checkpoints(there: dict[str, int]) -> list[str]:
    return sorted(key.split("/")[3] for key in there if key.endswith("manifest.json"))


def _kill_all(process: subprocess.Popen[bytes], run: Path) -> None:
    """The machine is gone, with all that runs on it."""
    doomed = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    doomed += [p for p in psutil.process_iter() if str(run) in " ".join(_command(p))]
    for each in doomed:
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.wait()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_run_is_in_the_store_whole_and_its_secrets_nowhere(
    stoker: Command, machine: Any, url: str, objects: Objects, tmp_path: Path
) -> None:
    done = stoker(
        "train", RECIPE, *SHORT, "pause=0", "--name", "a", "--runs", url, "--json", env=machine("one")
    )
    assert done.code == 0, done.err
    run = _copy(tmp_path, "one", url)
    assert done.answer["run"] == str(run)
    there = objects()
    for file in ("run.json", "provenance/code.json", "artifacts/model.safetensors", "artifacts/report.html"):
        assert there[f"ranked/a/{file}"] == (run / file).stat().st_size
    first = "ranked/a/journal/attempt-0001.rank-0"
    journal = sum(size for key, size in there.items() if key.startswith(first))
    assert journal == (run / "journal" / "attempt-0001.rank-0.jsonl").stat().st_size
    assert _checkpoints(there) == [path.name for path in manifest.committed(run / "checkpoints")]
    assert not [key for key in there if "/sinks/" in key or key.endswith(".lock")]
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        assert SECRET not in file.read_text(encoding="utf-8", errors="replace"), file


def test_another_machine_goes_on_where_one_was_stopped(
    start: Start, stoker: Command, machine: Any, url: str, tmp_path: Path
) -> None:
    same = ("train", RECIPE, *SHORT, "--runs", url, "--nproc", "2")
    process = start(*same, "--name", "a", env=machine("one"), first=slow_from(30))
    _wait_for_copy(tmp_path, url, process)
    wait_for_points(process, _copy(tmp_path, "one", url), 30)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    done = stoker(*same, "--name", "a", env=machine("two"))
    assert done.code == 0, done.err
    assert "resumed a from step" in done.err
    assert "waiting up to" not in done.err
    seen = loaded(_copy(tmp_path, "two", url))
    assert list(seen.points["loss"].x) == list(range(1, 81))
    assert len(seen.attempts) == 2
    assert stoker(*same, "--name", "b", "pause=0", env=machine("two")).code == 0
    assert _weights(_copy(tmp_path, "two", url)) == _weights(_copy(tmp_path, "two", url, "b"))
    listed = stoker("runs", "list", "--runs", url, "--json", env=machine("three"))
    assert {row["id"]: row["status"] for row in listed.answer["runs"]} == {"a": "finished", "b": "finished"}
    table = stoker(
        "runs", "export", "ranked", "--runs", url, "--format", "json", "--json", env=machine("four")
    )
    assert [row["run"] for row in table.answer["rows"]] == ["ranked/a"] * 80 + ["ranked/b"] * 80
    assert stoker("runs", "rm", "b", "--yes", "--runs", url, env=machine("three")).code == 0
    listed = stoker("runs", "list", "--runs", url, "--json", env=machine("one"))
    assert [row["id"] for row in listed.answer["runs"]] == ["a"]


@pytest.mark.soak
def test_a_machine_that_is_gone_leaves_a_run_to_go_on_with(
    start: Start, stoker: Command, machine: Any, url: str, objects: Objects, tmp_path: Path
) -> None:
    same = ("train", RECIPE, *SLOW, "steps=50", "checkpoint_every=10", "--runs", url, "--name", "a")
    process = start(*same, env=machine("one"), first=slow_from(12))
    _wait_for_copy(tmp_path, url, process)
    until(lambda: _checkpoints(objects()), process, every=0.2)
    _kill_all(process, _copy(tmp_path, "one", url))
    newest = int(_checkpoints(objects())[-1].removeprefix("step-"))
    begun = time.monotonic()
    waits = 60 if SOAK else 8  # more than the 5 s after which a lease that is held is written again
    short = f"from stoker.run import lease; lease.EXPIRES = {waits}"
    done = stoker(*same, env=machine("two"), first=short)
    assert done.code == 0, done.err
    assert time.monotonic() - begun > waits
    assert f"waiting up to {waits} s to see whether it still trains it" in done.err
    seen = loaded(_copy(tmp_path, "two", url))
    assert seen.attempts[-1].resumed_from >= newest
    assert list(seen.points["loss"].x) == list(range(1, 51))


def test_two_machines_do_not_train_one_run(
    start: Start, stoker: Command, machine: Any, url: str, tmp_path: Path
) -> None:
    same = ("train", RECIPE, *SLOW, "pause=0.3", "steps=30000", "--runs", url, "--name", "a")
    process = start(*same, env=machine("one"))
    _wait_for_copy(tmp_path, url, process)
    wait_for_points(process, _copy(tmp_path, "one", url), 5)
    done = stoker(*same, env=machine("two"))
    assert done.code == 2
    assert "waiting up to 60 s to see whether it still trains it" in done.err
    assert f"process {process.pid} on {os.uname().nodename} is training" in done.err
    time.sleep(3)
    listed = stoker("runs", "list", url, "--json", env=machine("two"))
    assert listed.code == 0, listed.err
    assert [row["status"] for row in listed.answer["runs"]] == ["running"]
    shipped = stoker("sync", "a", "--runs", url, env={**machine("two"), "STOKER_SINKS": "tensorboard"})
    assert shipped.code == 1
    assert f"{os.uname().nodename} is training {url}/ranked/a now" in shipped.err


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["500", "503", "hang", "drop"] if SOAK else ["hang"])
def test_a_store_that_fails_for_a_while_gets_all_of_it(
    mode: str, stoker: Command, machine: Any, url: str, proxy: Proxy, objects: Objects, tmp_path: Path
) -> None:
    proxy._only = lambda method, path: method in ("PUT", "POST") and "/checkpoints/" in path
    proxy.mode, proxy.left = mode, 8
    done = stoker("train", RECIPE, *SHORT, "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 0, done.err
    assert proxy.seen[mode] == 8
    run = _copy(tmp_path, "one", url)
    assert _checkpoints(objects()) == [path.name for path in manifest.committed(run / "checkpoints")]


@pytest.mark.soak(small=False)
def test_a_store_that_stays_away_costs_nothing_and_is_said_to(
    start: Start, stoker: Command, machine: Any, url: str, proxy: Proxy, objects: Objects, tmp_path: Path
) -> None:
    """It answers nothing from step 50 on; the run trains to its end, and goes there later."""
    env = machine("one")
    impatient = "from stoker.run import uploader; uploader.FINISH_PATIENCE = 20.0"
    same = ("train", RECIPE, *SLOW, "pause=0.1", "pause_from=50", "--name", "a", "--runs", url)
    process = start(*same, env=env, first=impatient)
    _wait_for_copy(tmp_path, url, process)
    run = _copy(tmp_path, "one", url)
    wait_for_points(process, run, 50)
    proxy._only, proxy.mode = lambda method, path: True, "503"
    out, said = process.communicate(timeout=LONG)
    err = said.decode()
    assert process.returncode == 75, err
    assert f"next: stoker sync a --runs {url}" in out.decode()
    assert "  in the store" not in out.decode()
    assert "cannot upload to" in err
    assert f"checkpoints are kept in {run / 'checkpoints'}" in err
    assert "`stoker sync` uploads the rest" in err
    assert loaded(run).status == "finished"
    kept = [path.name for path in manifest.committed(run / "checkpoints")]
    assert kept[-1] == "step-00000200"
    assert kept[-1] not in _checkpoints(objects())
    assert stoker("sync", "a", "--runs", url, env={**env, "STOKER_SINKS": "none"}).code == 1
    done = stoker(*same, env=env, first=impatient)
    assert done.code == 75, done.err
    proxy.mode = "ok"
    done = stoker(*same, env=env)
    assert done.code == 0, done.err
    assert "was already finished" in done.out
    assert _checkpoints(objects()) == kept


@pytest.mark.soak(small=False)
def test_what_was_compared_once_is_not_downloaded_again_to_list_it(
    stoker: Command, machine: Any, url: str, proxy: Proxy
) -> None:
    same = ("train", RECIPE, "steps=40", "checkpoint_every=20", "--name", "a", "--runs", url)
    assert stoker(*same, env=machine("one")).code == 0
    for _ in range(2):
        assert stoker("runs", "list", "--runs", url, env=machine("two")).code == 0
    proxy.log.clear()
    assert stoker("runs", "list", "--runs", url, env=machine("two")).code == 0
    read = [path for method, path in proxy.log if method == "GET" and "list-type" not in path]
    assert not [path for path in read if "/journal/" in path or "/checkpoints/" in path or "run.json" in path]


@pytest.mark.soak(small=False)
def test_a_machine_says_that_the_store_lacks_what_it_trained_and_another_one_did_not_continue(
    stoker: Command, machine: Any, url: str, bucket: Any, tmp_path: Path
) -> None:
    env = {**machine("one"), "STOKER_SINKS": "none"}
    same = ("train", RECIPE, "precision=fp32", "steps=20", "--name", "a", "--runs", url)
    assert stoker(*same, env=env).code == 0
    before = f"{url.removeprefix('s3://bucket/')}/ranked/a"
    assert stoker("checkpoints", "rm", "a", "20", "--runs", url, env=machine("two")).code == 0
    done = stoker("sync", "a", "--runs", url, env=env)
    assert done.code == 0, done.err
    assert f"all of it is in {url}" in done.out
    bucket.objects.filter(Prefix=f"{before}/journal/").delete()
    assert stoker("resume", "a", "steps=30", "--runs", url, env=machine("two")).code == 0
    done = stoker("sync", "a", "--runs", url, env=env)
    assert done.code == 1
    assert "lacks what this machine trained" in done.err


def test_a_damaged_checkpoint_is_mended_from_the_store(
    start: Start, stoker: Command, machine: Any, url: str, tmp_path: Path
) -> None:
    env = machine("one")
    same = ("train", RECIPE, *SHORT, "--name", "a", "--runs", url)
    assert stoker(*same, "pause=0", env=env).code == 0
    run = _copy(tmp_path, "one", url)
    newest = manifest.committed(run / "checkpoints")[-1]
    shard = next(newest.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = stoker("checkpoints", "verify", "a", "--runs", url, env=env)
    assert done.code == 0, done.out
    assert shard.read_bytes() == whole


@pytest.mark.soak
def test_a_store_that_is_away_while_a_run_is_resumed_loses_nothing_of_it(
    stoker: Command, machine: Any, url: str, proxy: Proxy, objects: Objects, tmp_path: Path
) -> None:
    """Another machine has the manifests of its checkpoints, and may not read their files for a while."""
    there = ("--runs", url, "--nproc", "2" if SOAK else "1")
    short = ("train", RECIPE, "precision=fp32", "steps=20", "checkpoint_every=10", "--name", "a", *there)
    assert stoker(*short, env=machine("one")).code == 0
    resume = ("resume", "a", "steps=25", *there)
    before = _checkpoints(objects())
    files = "/checkpoints/[^?]*[.]safetensors"
    proxy._only, proxy.mode = lambda method, path: re.search(files, path) is not None, "403"
    failed = stoker(*resume, "--max-restarts", "1", env=machine("two"))
    assert failed.code == 1, failed.err
    assert "the checkpoint of step 20 cannot be used" in failed.err
    assert "Start the run again when the store can be reached" in failed.err
    seen = loaded(_copy(tmp_path, "two", url))
    assert [attempt.status for attempt in seen.attempts] == ["finished", "failed", "failed"]
    assert list(seen.points["loss"].x) == list(range(1, 21))
    assert _checkpoints(objects()) == before
    proxy.mode = "ok"
    done = stoker(*resume, env=machine("two"))
    assert done.code == 0, done.err
    assert "resumed a from step 20" in done.err


def test_any_machine_ships_to_the_sinks_a_run_that_another_one_trained(
    stoker: Command, machine: Any, url: str, objects: Objects
) -> None:
    done = stoker("train", RECIPE, "steps=20", "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 0, done.err
    before = objects()
    env = {**machine("two"), "STOKER_SINKS": "tensorboard"}
    done = stoker("sync", "a", "--runs", url, "--json", env=env)
    assert done.code == 0, done.err
    (sink,) = done.answer["sinks"]
    assert sink["shipped"] >= 20
    assert sink["pending"] == 0
    assert objects() == before


@pytest.mark.soak(small=False)
def test_what_one_machine_adds_to_a_run_every_other_one_sees(
    stoker: Command, machine: Any, url: str, proxy: Proxy
) -> None:
    done = stoker("train", RECIPE, "steps=20", "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 0, done.err
    for name in ("one", "two"):
        done = stoker("runs", "tag", "a", f"{name}=yes", "--runs", url, env=machine(name))
        assert done.code == 0, done.err
    proxy.mode = "503"
    done = stoker("runs", "tag", "a", "more=yes", "--runs", url, env=machine("two"))
    assert done.code == 0, done.err
    assert "the change to run a is known only on this machine" in done.err
    shown = stoker("runs", "tag", "a", "--runs", url, "--json", env=machine("three"))
    assert shown.answer["tags"] == {"one": "yes", "two": "yes"}


@pytest.mark.soak(small=False)
def test_what_a_run_without_metrics_makes_is_used_on_another_machine_and_the_first_one_sees_it(
    stoker: Command, machine: Any, url: str, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("1\n")
    for name, does in (("maker", "artifact('table.csv', name='table')"), ("user", "use('maker:table')")):
        (tmp_path / f"{name}.py").write_text(f"def train(run):\n    run.{does}\n")
        done = stoker("train", f"{name}.py", "--name", name, "--runs", url, env=machine(name))
        assert done.code == 0, done.err
    shown = stoker("runs", "show", "maker", "--runs", url, "--json", env=machine("maker"))
    assert [used["run"]["id"] for used in shown.answer["used_by"]] == ["user"]
    assert "finished" in stoker("runs", "list", "--runs", url, env=machine("three")).out


def test_a_store_that_is_not_there_starts_nothing(
    stoker: Command, machine: Any, url: str, proxy: Proxy
) -> None:
    proxy._only, proxy.mode = lambda method, path: True, "refuse"
    done = stoker("train", RECIPE, "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 1
    assert f"stoker: error: {url}" in done.err
    assert "Traceback" not in done.err


def test_a_bucket_that_is_not_there_is_named(stoker: Command, machine: Any, proxy: Proxy) -> None:
    done = stoker("train", RECIPE, "--name", "a", "--runs", "s3://elsewhere/runs", env=machine("one"))
    assert done.code == 2
    assert "s3://elsewhere/runs/ranked/a cannot be written to" in done.err


DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def test_who_may_not_delete_in_a_store_is_told_before_anything_is_there(
    stoker: Command, machine: Any, url: str, proxy: Proxy, objects: Objects
) -> None:
    """Else the run could neither be gone on with on another machine, nor ever be there whole."""
    proxy._only = lambda method, path: method == "DELETE" or (method == "POST" and "delete" in path)
    proxy.mode, proxy.said = "403", DENIED
    done = stoker("train", RECIPE, "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 1
    needed = "provide credentials that allow listing, reading, writing and deleting in this folder"
    assert re.search(f"stoker: error: {url}/.*Access Denied; {needed}", done.err), done.err
    assert not objects()


def test_where_a_store_has_no_runs_its_url_is_said_and_not_its_copys(
    stoker: Command, machine: Any, tmp_path: Path
) -> None:
    at = ("--runs", "s3://elsewhere/runs")
    for words in (("runs", "list"), ("runs", "show", "a"), ("jobs", "list"), ("jobs", "show", "a")):
        done = stoker(*words, *at, env=machine("one"))
        assert "under s3://elsewhere/runs" in done.out + done.err
        assert str(tmp_path / "one") not in done.out + done.err


def test_a_checkpoint_is_removed_here_and_there(
    stoker: Command, machine: Any, url: str, objects: Objects
) -> None:
    done = stoker("train", RECIPE, *SHORT, "pause=0", "--name", "a", "--runs", url, env=machine("one"))
    assert done.code == 0, done.err
    before = _checkpoints(objects())
    assert stoker("checkpoints", "rm", "a", "60", "--runs", url, env=machine("two")).code == 0
    assert _checkpoints(objects()) == [name for name in before if name != "step-00000060"] != before
    rows = stoker("checkpoints", "a", "--runs", url, "--json", env=machine("three")).answer["checkpoints"]
    assert [row["step"] for row in rows if not row["problem"]] == [40, 80]


def _wait_for_copy(tmp_path: Path, url: str, process: subprocess.Popen[bytes], machine: str = "one") -> None:
    until(lambda: any((tmp_path / machine / "stores").glob("*")), process)


@pytest.mark.soak(small=False)
def test_a_machine_that_comes_back_takes_what_another_one_made_of_the_run(
    start: Start, stoker: Command, machine: Any, url: str, proxy: Proxy, bucket: Any, objects: Objects,
    tmp_path: Path,
) -> None:  # fmt: skip
    """It trained on while the store was away; another machine went on from before that."""
    same = ("train", RECIPE, *SLOW, "--runs", url, "--name", "a")
    process = start(*same, env=machine("one"), first=slow_from(20, pause=0.15))
    _wait_for_copy(tmp_path, url, process)
    run = _copy(tmp_path, "one", url)
    until(lambda: _checkpoints(objects()), process, every=0.2)
    proxy._only, proxy.mode = lambda method, path: True, "refuse"
    before = _checkpoints(objects())[-1]
    until(lambda: manifest.committed(run / "checkpoints")[-1].name > before, process)
    _kill_all(process, run)
    proxy.mode = "ok"
    bucket.objects.filter(Prefix=f"{url.removeprefix('s3://bucket/')}/ranked/a/lease/").delete()
    other = start(*same, env=machine("two"), first=slow_from(0, pause=0.3))
    _wait_for_copy(tmp_path, url, other, "two")
    copy = _copy(tmp_path, "two", url)
    until((copy / "journal" / "attempt-0002.rank-0.jsonl").exists, other)
    wait_for_points(other, copy, 3)
    other.send_signal(signal.SIGTERM)
    _, err = other.communicate(timeout=LONG)
    assert other.returncode == 75, err.decode()
    assert f"resumed a from step {int(before.removeprefix('step-'))}" in err.decode()
    done = stoker(*same, env=machine("one"))
    assert done.code == 0, done.err
    assert "is void: another machine resumed from before it" in done.err
    seen = loaded(run)
    assert list(seen.points["loss"].x) == list(range(1, 201))
    assert len(seen.attempts) == 3
