"""`--on` and `--dry-run` where no cluster is."""

from __future__ import annotations

import re
import sys
import uuid
from pathlib import Path

import pytest
from stoker import object_store
from stoker.errors import BadInput
from stoker.launch import jobs
from stoker.launch.jobs import Job
from stoker.launch.jobspec import JobSpec

from commands import Command

RECIPE = str(Path(__file__).parents[1] / "cli" / "searched.py")
DOCS = Path(__file__).parents[2] / "docs" / "clusters.md"


def test_the_script_in_the_docs_is_what_dry_run_prints(stoker: Command, tmp_path: Path) -> None:
    slurm = DOCS.read_text().partition("## Slurm")[2]
    command, script = re.findall(r"```(?:sh|bash)\n(.*?)```", slurm, re.DOTALL)[:2]
    words = command.replace("\\\n", " ").split()[1:]
    done = stoker(*words, env={"HF_TOKEN": "x"})
    assert done.code == 0, done.err
    printed = re.sub(r"\.jobs/\d{8}-\d{6}-\w{4}", ".jobs/20261126-111500-3f9a", done.out)
    printed = printed.replace(str(tmp_path), "/home/me/project").replace(
        sys.executable, "/home/me/.venv/bin/python"
    )
    assert printed == script
    assert not list(tmp_path.iterdir())


def test_a_dry_run_here_prints_the_same_command(stoker: Command, tmp_path: Path) -> None:
    asked = ("--env", "K=a b", "--cpus", "1", "--time", "4h", "--retries", "2", "--dry-run", "--on=local")
    done = stoker("train", RECIPE, "steps=5", *asked, "--name", "a")
    limits = "--max-time 4h --max-restarts 2"
    assert done.out == (
        f"env 'K=a b' OMP_NUM_THREADS=1 {sys.executable} -m stoker train {RECIPE} steps=5 --name a {limits}\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["local", "slurm"])
def test_a_dry_run_has_an_answer_for_programs_too(target: str, stoker: Command) -> None:
    asked = ("train", RECIPE, "--name", "a", "--on", target, "--dry-run")
    answer, printed = stoker(*asked, "--json").answer, stoker(*asked).out
    assert answer["target"] == target
    known = r"\.jobs/[\w-]+"  # each is a job of its own
    assert re.sub(known, "", answer["rendered"]) == re.sub(known, "", printed)


def test_a_job_here_has_the_variables_it_was_given(stoker: Command, tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text("import os\n\n\ndef train(run):\n    run.note(os.environ['K'])\n")
    assert stoker("train", "says.py", "--name", "a", "--env", "K=a b").code == 0
    assert stoker("runs", "show", "a", "--json").answer["notes"][0]["text"] == "a b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--on", "slurm"), "sbatch not found"),
        (("--on", "slurn"), "did you mean 'slurm'?"),
        (("--on", "slurm", "--rendezvous", "a:1", "--nodes", "2"), "the nodes find each other without it"),
        (("--gpus", "99"), "--gpus 99: this machine has"),
        (("--memory", "999TB"), "--memory 1022976G: this machine has"),
        (("--option", "partition=gpu"), "is for clusters"),
        (("--retries", "1", "--max-restarts", "2"), "mean the same on this machine; give one of them"),
        (
            ("--on", "ray", "--time", "4h", "--max-time", "1h"),
            "on ray they are the same; give only one of them",
        ),
        (("--on", "slurm", "--option", "partition", "--dry-run"), "give partition=VALUE, or omit it"),
        (("--time", "3", "--dry-run"), "--time '3' is not a length of time"),
        (("--on", "slurm", "--option", "job name=x", "--dry-run"), "give KEY=VALUE, such as partition=gpu"),
        (("--on", "slurm", "--option", "job=x", "--dry-run"), "Slurm would read it as job-name"),
        (
            ("--on", "slurm", "--option", "comment=a\nb", "--dry-run"),
            "comment: its value contains a line break",
        ),
        (("--on", "ray", "--option", "working-dir=/nope", "--dry-run"), "the folder does not exist"),
        (
            ("--on", "kubernetes", "--option", "image=x y", "--dry-run"),
            "image=x y: not a valid image name",
        ),
        (("--on", "kubernetes", "--option", "claim=Not_Valid", "--dry-run"), "lower-case letters, digits"),
        (("--on", "kubernetes", "--option", "node.=x", "--dry-run"), "give node.LABEL=VALUE"),
    ],
)
def test_what_cannot_be_submitted_leaves_nothing_behind(
    arguments: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    done = stoker("train", RECIPE, *arguments, env={"PATH": "/nowhere"})
    assert done.code == 2
    assert re.search(said, done.err), done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--on", "slurm", "--controllers", "2"), "need a study in a database"),
        (("--controllers", "2"), "is for jobs"),
        (("--on", "ray", "--gpus", "2"), "--gpus is for jobs"),
        (("--retries", "2"), "see --max-failures"),
        (("--on", "slurm", "--storage", "postgresql://me:secret@host/db"), "the password would be written"),
    ],
)
def test_a_sweep_that_cannot_be_a_job_is_refused(
    arguments: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    done = stoker("sweep", RECIPE, "x=uniform(0, 1)", *arguments, "--dry-run")
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_script_of_ones_own_submits_itself(tmp_path: Path) -> None:
    import subprocess

    script = tmp_path / "mine.py"
    script.write_text("import stoker\n\n\ndef train(run):\n    run.log(loss=1.0)\n\n\nstoker.main(train)\n")
    command = [sys.executable, str(script), "--on", "slurm", "--name", "a", "--dry-run"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"{sys.executable} {script} --name a\n" in out


def test_a_job_is_shown_with_all_that_was_asked_for_it(stoker: Command, tmp_path: Path) -> None:
    spec = JobSpec(
        name="a", command=("true",), folder=tmp_path, time=14400.0, retries=3, passed=("HF_TOKEN",),
        environment={"MODE": "hidden"}, options={"partition": "gpu", "hold": ""},
    )  # fmt: skip
    job = jobs.planned("slurm", spec, tmp_path / "runs", ("searched/a",))
    jobs.begin(job, "script.sh", "")
    jobs.remember(job, "42")
    shown = stoker("jobs", "show", "42", env={"PATH": "/nowhere"}).out
    for line in ("time limit   4h", "retries      3", "options      partition=gpu, hold"):
        assert f"  {line}\n" in shown
    assert "  variables    MODE, HF_TOKEN\n" in shown
    assert "hidden" not in shown
    assert f"\nnext: stoker jobs logs {job.id}\n" in shown
    environment = {"PATH": "/nowhere", "STOKER_RUNS": "other"}
    shown = stoker("jobs", "show", "42", "--runs", str(tmp_path / "runs"), env=environment).out
    assert f"\nnext: stoker jobs logs {job.id} --runs runs\n" in shown


@pytest.mark.usefixtures("proxy")
def test_a_job_whose_bucket_does_not_exist_is_refused(tmp_path: Path) -> None:
    def planned(url: str) -> Job:
        spec = JobSpec(name="a", command=("true",), folder=tmp_path)
        return jobs.planned("slurm", spec, object_store.working_copy(url), ("searched/a",))

    with pytest.raises(BadInput, match="s3://nobody-has-it/runs: this bucket does not exist"):
        jobs.check_store(planned("s3://nobody-has-it/runs"))
    there = planned(f"s3://bucket/{uuid.uuid4().hex}")
    jobs.check_store(there)
    store = object_store.of(there.runs)
    assert store is not None
    assert not store.objects()


def test_a_secret_in_a_command_is_not_written_into_a_script(stoker: Command, tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Config:\n"
        "    hub_token: str = ''\n\n\ndef train(run, config: Config):\n    pass\n"
    )
    done = stoker("train", "asks.py", "hub_token=hf_planted", "--on", "slurm", "--dry-run")
    assert done.code == 2
    assert "the secret would be stored with the job" in done.err
    assert "hf_planted" not in done.out + done.err
