"""What a job is, and its sbatch script as bash reads it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker import object_store
from stoker.errors import BadInput
from stoker.launch import jobs, jobspec, slurm
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec
from stoker.object_store import Unreachable

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def _job(runs: Path = Path("/runs"), **fields: object) -> Job:
    known = {"name": "digits/a", "command": ("true",), "folder": Path("/here"), **fields}
    return jobs.planned("slurm", JobSpec(**known), runs, ("digits/a",))  # type: ignore[arg-type]


@given(st.lists(WORDS, max_size=4), WORDS)
@settings(max_examples=30)
def test_bash_hands_on_every_argument_and_variable_as_it_was_given(words: list[str], value: str) -> None:
    program = ("/usr/bin/printf", r"%s\0", "-", *words, f"at {RENDEZVOUS}", f"{ELEMENT}-th", "last")
    script = slurm.render(_job(command=program, environment={"GIVEN": value}))
    stand_in = 'srun() { while [ "${1#--}" != "$1" ]; do shift; done; "$@"; printf %s "$GIVEN"; exit; }\n'
    found = subprocess.run(
        ["bash", "-c", stand_in + script],
        env={"SLURM_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "7", "PATH": "/usr/bin:/bin"},
        capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    assert found[0] == "-"
    assert found[1 : 1 + len(words)] == words
    assert found[1 + len(words)].endswith(":22345")
    assert found[-3:] == ["7-th", "last", value]


def test_a_record_says_what_was_submitted(tmp_path: Path) -> None:
    job = _job(tmp_path, command=("a", RENDEZVOUS), memory=2**30, options={"partition": "gpu"}, passed=("A",))
    jobs.begin(job, "script.sh", "#!/bin/bash\n")
    known = jobs.remember(jobs.signed(job), "42")
    assert known.by
    assert jobs.every(tmp_path) == [known]
    for name in (job.id, job.id[:15], "42", "a", "digits/a"):
        assert jobs.find(tmp_path, name) == known
    with pytest.raises(BadInput, match="no job '43'"):
        jobs.find(tmp_path, "43")
    with pytest.raises(BadInput, match="give a job's id"):
        jobs.find(tmp_path, "")


def test_a_record_of_another_version_does_not_hide_the_others(tmp_path: Path) -> None:
    known = []
    for native in ("1", "2", "3"):
        job = _job(tmp_path)
        jobs.begin(job, "script.sh", "")
        known.append(jobs.remember(job, native))
    for job, changed in zip(
        known,
        ({"newer": 1, "spec": {**known[0].spec.to_json(), "newer": 1}}, {"spec": None}, {}),
        strict=True,
    ):
        file = job.folder / jobs.RECORD
        record = json.loads(file.read_text()) | changed
        file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    assert [job.native for job in jobs.every(tmp_path)] == ["1", "3"]


def test_without_the_store_it_is_not_said_that_there_are_no_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: object, prefix: str = "") -> None:
        raise Unreachable("it does not answer")

    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    runs = object_store.working_copy(f"file://{tmp_path}/store")
    monkeypatch.setattr(object_store.Store, "objects", away)
    with pytest.raises(Unreachable):
        jobs.every(runs)
    job = _job(runs)
    jobs.begin(job, "script.sh", "")
    jobs.remember(job, "42")
    assert [job.native for job in jobs.every(runs)] == ["42"]


def test_a_user_without_a_name_and_code_that_cannot_be_read_hold_no_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_999_999)

    def unreadable(_: object) -> None:  # root, who may read any file, runs this too
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stoker.reproduce.bundle.read", unreadable)
    job = jobs.signed(_job(tmp_path))
    assert job.by.startswith("4999999@")
    assert job.code == {}


@pytest.mark.parametrize(
    ("text", "count"), [("64GB", 2**36), ("64G", 2**36), ("512MB", 2**29), ("1.5TiB", 3 * 2**39)]
)
def test_memory_is_in_powers_of_1024(text: str, count: int) -> None:
    assert jobspec.memory(text) == count


@pytest.mark.parametrize("text", ["64", "GB", "-1GB", "0GB", "1 byte"])
def test_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="such as 64GB"):
        jobspec.memory(text)


def test_a_variable_without_a_value_is_passed_on_and_not_written_down() -> None:
    assert jobspec.environment(["A=b=c", "B="], {}) == ({"A": "b=c", "B": ""}, ())
    assert jobspec.environment(["HF_TOKEN"], {"HF_TOKEN": "x"}) == ({}, ("HF_TOKEN",))
    for file in ("/keys/my-project.json", "/keys/key", "/keys/my key"):
        path = {"GOOGLE_APPLICATION_CREDENTIALS": file}
        assert jobspec.environment(["=".join(one) for one in path.items()], {}) == (path, ())


def test_a_variable_that_is_in_a_secret_need_not_be_set_here(caplog: pytest.LogCaptureFixture) -> None:
    assert jobspec.environment(["HF_TOKEN"], {}, stored=True) == ({}, ("HF_TOKEN",))
    assert "--env HF_TOKEN: not set here, so the job starts only if the Secret has it" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("HF_TOKEN=x", "looks like a secret"),
        ("AWS_SECRET_ACCESS_KEY=x", "looks like a secret"),
        ("AWS_SECRET_ACCESS_KEY=/x/key.json", "looks like a secret"),
        ("MY_CREDENTIALS=me:pw", "looks like a secret"),
        ("MY_CREDENTIALS=x/key.json", "looks like a secret"),
        ("MY_CREDENTIALS=/9j/4AAQSkZJRgABAQEASABIAAD", "looks like a secret"),
        ("MY_CREDENTIALS=/x/ghp_0123456789abcdefghij0123456789abcdef.json", "looks like a secret"),
        ("NOT_SET", "not set; export"),
        ("1A=b", "give NAME=VALUE"),
        ("=b", "give NAME=VALUE"),
    ],
)
def test_a_variable_that_cannot_be_written_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        jobspec.environment([text], {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"time": 120.0}, "--time 2min: Slurm tells the job to stop 2 minutes before that"),
        ({"options": {"nodes": "2"}}, "use --nodes instead"),
        ({"options": {"output": "x"}}, "the script sets this"),
        ({"options": {"p": "gpu"}}, "use its long name"),
        ({"options": {"signal": "KILL@9"}}, "give USR1@SECONDS"),
        ({"gpus": 1, "processes": 2}, "each rank needs a GPU"),
        ({"cpus": 1, "processes": 2}, "each rank needs at least one core"),
    ],
)
def test_a_script_that_could_not_go_on_is_not_written(fields: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        slurm.render(_job(**fields))


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:a100:4(S:0-1),nvme:1", 4),
        ("gpu:a100:4,gpu:t4:2", 6),
        ("shard:9", 0),
    ],
)
def test_gpus_are_counted_as_sinfo_says_them(resources: str, count: int) -> None:
    assert slurm._gpus(resources) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("5:00", 300), ("4:00:00", 14400), ("2-00:00:30", 172830), ("infinite", math.inf)]
)
def test_a_limit_is_read_as_sinfo_says_it(text: str, seconds: float) -> None:
    assert slurm._limit(text) == seconds


def test_jobs_of_a_store_are_known_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_on(machine: str) -> Path:
        monkeypatch.setenv("STOKER_CACHE", str(tmp_path / machine))
        return object_store.working_copy(f"file://{tmp_path}/store")

    one = runs_on("one")
    job = _job(one)
    jobs.begin(job, "script.sh", "#!/bin/bash\n")
    (job.folder / "node-0.log").write_text("said\n")
    known = jobs.remember(jobs.signed(job), "42")
    two = runs_on("two")
    assert jobs.every(two) == [dataclasses.replace(known, runs=two)]
    assert sorted(file.name for file in jobs.find(two, "42").folder.iterdir()) == ["job.json", "script.sh"]
    jobs.write(dataclasses.replace(jobs.find(two, "42"), cancelled=True))
    assert jobs.find(runs_on("one"), "42").cancelled
    assert (job.folder / "node-0.log").read_text() == "said\n"


def test_that_a_job_was_cancelled_is_not_taken_back_where_the_store_could_not_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: object, key: str, file: Path) -> None:
        raise Unreachable("it does not answer")

    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    job = _job(object_store.working_copy(f"file://{tmp_path}/store"))
    jobs.begin(job, "script.sh", "")
    known = jobs.remember(job, "42")
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(object_store.Store, "put", away)
        jobs.write(dataclasses.replace(known, cancelled=True))
    assert jobs.find(job.runs, "42").cancelled
