"""`--on kubernetes`: manifests held against the published schemas, and kubectl talking to a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker.errors import BadInput
from stoker.launch import jobs, kubernetes, kubernetes_options
from stoker.launch.jobspec import ELEMENT, JobSpec

import kubernetes_api
from commands import Command, Start
from kubernetes_api import Api
from support import LONG, until

RECIPE = str(Path(__file__).parents[1] / "cli" / "ranked.py")
TWO = (
    "train", RECIPE, "steps=5", "--on", "kubernetes", "--name", "a", "--nodes", "2", "--nproc", "8",
    "--gpus", "8", "--cpus", "32", "--memory", "512GB", "--time", "4h", "--retries", "2",
    "--option", "image=registry/train:1", "--option", "claim=runs",
)  # fmt: skip


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    made = Api(tmp_path)
    made.objects["Node", "n1"] = {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
        "status": {"allocatable": {"nvidia.com/gpu": "8"}},
    }  # fmt: skip
    monkeypatch.setenv("KUBECONFIG", str(made.config))
    yield made
    made.close()


def _rendered(stoker: Command, *arguments: str) -> dict[str, dict[str, Any]]:
    """What `--dry-run` prints, by kind; each part is what its schema has."""
    done = stoker(*arguments, "--dry-run")
    assert done.code == 0, done.err
    parts = list(yaml.safe_load_all(done.out))
    for part in parts:
        kubernetes_api.check(part)
    return {part["kind"]: part for part in parts}


def _without_retries(words: tuple[str, ...]) -> tuple[str, ...]:
    at = words.index("--retries")
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("name", [(), ("--name", "a")])
@pytest.mark.parametrize("runs", ["oci://bucket/runs", "s3://bucket/runs"])
def test_a_dry_run_needs_neither_the_store_nor_its_driver(
    runs: str, name: tuple[str, ...], stoker: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # where nothing listens
    asked = ("train", RECIPE, "--on", "kubernetes", "--option", "image=a", "--runs", runs, *name)
    pod = _rendered(stoker, *asked)["Job"]["spec"]["template"]["spec"]
    words = pod["containers"][0]["command"]
    assert words[words.index("--runs") + 1] == runs
    assert "--name" in words
    if runs.startswith("oci:"):
        refused = stoker(*asked)
        assert refused.code == 2
        assert "driver that is not installed" in refused.err


def test_a_job_of_two_nodes_is_two_pods_that_meet_at_the_first(stoker: Command) -> None:
    parts = _rendered(stoker, *TWO, "--env", "NCCL_DEBUG=INFO")
    job, service = parts["Job"], parts["Service"]
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert job["spec"]["activeDeadlineSeconds"] == 4 * 3600
    assert job["spec"]["backoffLimit"] == 4
    assert pod["subdomain"] == name == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert words[:4] == ["python", "-m", "stoker", "train"]
    assert words[words.index("--rendezvous") + 1] == f"{name}-0.{name}:29400"
    assert words[-2:] == ["--runs", "/runs"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    assert {"name": "OMP_NUM_THREADS", "value": "4"} in container["env"]
    assert container["resources"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": "8"}
    assert not {"--on", "--gpus", "--option", "--dry-run", "--time", "--retries"} & {*words}


def test_pods_go_where_nodes_with_gpus_are_tainted_and_fit_into_a_quota(stoker: Command) -> None:
    given = ("--option", "toleration=pool=training,spot")
    pod = _rendered(stoker, *TWO, *given)["Job"]["spec"]["template"]["spec"]
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "pool", "operator": "Equal", "value": "training"},
        {"key": "spot", "operator": "Exists"},
    ]
    (waiting,) = pod["initContainers"]
    for amount in ("requests", "limits"):
        assert waiting["resources"][amount].keys() == {"cpu", "memory"}
    done = stoker(*TWO, "--option", "toleration=,", "--dry-run")
    assert done.code == 2
    assert "give KEY or KEY=VALUE of a taint" in done.err


def test_a_pod_that_was_told_to_stop_is_no_failure_and_bad_input_is_final(stoker: Command) -> None:
    rules = _rendered(stoker, *TWO)["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert codes == {2: "FailJob", 75: "Ignore"}


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_kubeflows_kinds_start_the_ranks_by_torchrun(kind: str, stoker: Command) -> None:
    two = TWO if kind == "pytorchjob" else _without_retries(TWO)
    (made,) = _rendered(stoker, *two, "--option", f"kind={kind}", "--max-restarts", "1").values()
    spec = made["spec"]
    if kind == "trainjob":
        words = spec["trainer"]["command"]
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (2, 8)
    else:
        replicas = spec["pytorchReplicaSpecs"]
        words = replicas["Master"]["template"]["spec"]["containers"][0]["command"]
        assert (spec["nprocPerNode"], replicas["Worker"]["replicas"]) == ("8", 1)
    assert words[:5] == ["torchrun", "--max-restarts=1", "-m", "stoker", "train"]
    assert not {"--nodes", "--nproc", "--rendezvous", "--max-restarts"} & {*words}
    assert words[words.index("--name") + 1] == "a"


@pytest.mark.parametrize("kind", ["job", "pytorchjob", "trainjob"])
def test_pods_have_what_their_cluster_asks_of_them(kind: str, stoker: Command) -> None:
    two = TWO if kind != "trainjob" else _without_retries(TWO)
    given = {
        "kind": kind, "grace": "10min", "ephemeral-storage": "50GB", "user": "1000", "fs-group": "2000",
        "secret-files": "gcs:/keys", "service-account": "trainer",
        **({"priority-class": "low"} if kind != "trainjob" else {}),
    }  # fmt: skip
    key = ("--env", "GOOGLE_APPLICATION_CREDENTIALS=/keys/key.json")
    options = (word for name, value in given.items() for word in ("--option", f"{name}={value}"))
    made = _rendered(stoker, *two, *options, *key)
    spec = made.popitem()[1]["spec"]
    if kind == "trainjob":
        (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod, resources = job["template"]["spec"]["template"]["spec"], spec["trainer"]["resourcesPerNode"]
        variables = spec["trainer"]["env"]
    else:
        of_pods = spec if kind == "job" else spec["pytorchReplicaSpecs"]["Worker"]
        pod = of_pods["template"]["spec"]
        (container,) = pod["containers"]
        resources, variables = container["resources"], container["env"]
        assert pod["priorityClassName"] == "low"
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["serviceAccountName"] == "trainer"
    assert pod["securityContext"] == {
        "fsGroup": 2000, "runAsUser": 1000, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}
    }  # fmt: skip
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == context
    assert {"name": "secret-files", "secret": {"secretName": "gcs"}} in pod["volumes"]
    mount = {"name": "secret-files", "mountPath": "/keys", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]
    assert resources["limits"]["ephemeral-storage"] == resources["requests"]["ephemeral-storage"] == "50Gi"
    assert {"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": "/keys/key.json"} in variables


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("node.pool=-bad-", "at most 63 letters"),
        ("node.a/b/c=x", "at most 63 letters"),
        ("node.=x", "give node.LABEL=VALUE"),
        ("gpu-resource=NVIDIA GPU", "such as nvidia.com/gpu"),
        ("gpu-resource=gpu", "such as nvidia.com/gpu"),
        ("namespace=team.ml", "the name of a namespace"),
        (f"queue={'q' * 80}", "at most 63"),
        ("claim=a..b", "a Kubernetes name has only"),
        ("toleration=-bad-", "give KEY or KEY=VALUE of a taint"),
        ("priority-class=High", "a Kubernetes name has only"),
        ("grace=soon", "--option grace: 'soon' is not a length of time"),
        ("ephemeral-storage=much", "give a size"),
        ("user=root", "give an id"),
        ("fs-group=0", "give an id"),
        ("secret-files=keys", "give NAME:/FOLDER"),
        ("secret-files=Keys:/keys", "give NAME:/FOLDER"),
        ("secret-files=keys:/runs", "a folder of its own"),
    ],
)
def test_a_setting_that_a_cluster_would_refuse_is_refused_here(option: str, said: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(BadInput, match=re.escape(said)):
        kubernetes_options.check({name: value})


@pytest.mark.parametrize(
    "option",
    [
        "node.kubernetes.io/arch=amd64", "node.pool=", "gpu-resource=nvidia.com/mig-1g.5gb",
        "namespace=team-ml",
        "toleration=spot,example.com/pool=A_1", "queue=team.low", "secret-files=keys:/var/keys",
    ],
)  # fmt: skip
def test_a_setting_that_a_cluster_accepts_is_accepted(option: str) -> None:
    name, _, value = option.partition("=")
    kubernetes_options.check({name: value})


def test_a_trainjob_that_could_not_be_tried_again_is_refused(stoker: Command) -> None:
    done = stoker(*TWO, "--option", "kind=trainjob", "--dry-run")
    assert done.code == 2
    assert "--retries 2: a TrainJob has no such setting" in done.err


def test_names_begin_with_a_letter_as_a_service_must(stoker: Command) -> None:
    made = _rendered(stoker, *TWO, "--experiment", "2026")
    assert made["Service"]["metadata"]["name"].startswith("run-2026-a-")


def test_a_cluster_without_gpus_may_add_a_node_that_has_some(stoker: Command, api: Api) -> None:
    api.objects["Node", "n1"]["status"]["allocatable"].clear()
    done = stoker(*TWO)
    assert done.code == 0, done.err
    assert "no node has nvidia.com/gpu now: the pods wait until the cluster adds one" in done.err
    assert api.of_kind("Job")


@given(st.lists(st.text("$()HOME5", max_size=12), min_size=1, max_size=4), st.text("$()HOME5", max_size=12))
@settings(max_examples=200)
def test_pods_get_every_argument_and_variable_as_it_was_given(words: list[str], value: str) -> None:
    spec = JobSpec(
        name="a", command=("python", *words, f"{value}{ELEMENT}"), folder=Path("/here"), elements=2,
        environment={"GIVEN": value}, options={"image": "a", "claim": "b"},
    )  # fmt: skip
    job = yaml.safe_load(kubernetes.render(jobs.planned("kubernetes", spec, Path("/runs"), ("a",))))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    known = {"HOME": "/root", "JOB_COMPLETION_INDEX": "1"}
    found = [kubernetes_api.expanded(word, known) for word in container["command"]]
    assert found[1:-2] == [*words, f"{value}1"]
    (variable,) = (one["value"] for one in container["env"] if one["name"] == "GIVEN")
    assert kubernetes_api.expanded(variable, known) == value


def test_a_pod_that_is_replaced_once_the_first_has_ended_ends_as_the_run_has(
    stoker: Command, tmp_path: Path
) -> None:
    pod = _rendered(stoker, *TWO)["Job"]["spec"]["template"]["spec"]
    (waiting,), (container,) = pod["initContainers"], pod["containers"]
    command = [kubernetes_api.expanded(word, {}) for word in waiting["command"]]
    with subprocess.Popen(command) as told:
        until(psutil.Process(told.pid).children, told)  # it waits
        told.terminate()
    assert told.returncode == 143
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in (("sleep", 0), ("getent", 2)):  # nobody has that long
        (programs / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(command, env=path, check=False).returncode == 0
    there = str(tmp_path / "there")
    words = [there if word == "/runs" else word for word in container["command"][3:]]
    in_pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    later = stoker(*words, env=in_pod)
    assert later.code == 75, later.err
    assert "exit code 75 asks for another try later" in later.err
    assert stoker("train", RECIPE, "steps=5", "--name", "a", "--runs", there).code == 0
    again = stoker(*words, env=in_pod)
    assert (again.code, "was already finished" in again.out) == (0, True), again.err


def test_what_looks_like_a_variable_stays_what_it_is(stoker: Command) -> None:
    one = ("train", RECIPE, "--on", "kubernetes", "--option", "image=a", "--runs", "s3://bucket/$(HOME)")
    (job,) = _rendered(stoker, *one).values()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "s3://bucket/$$(HOME)" in container["command"]
    assert "subdomain" not in job["spec"]["template"]["spec"]


def test_a_manifest_has_letters_as_they_were_given(stoker: Command) -> None:
    one = ("train", RECIPE, "--on", "kubernetes", "--option", "image=a", "--option", "claim=b")
    assert "café" in stoker(*one, "--env", "PLACE=café", "--dry-run").out


def test_a_secret_is_named_and_its_value_is_nowhere(stoker: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    elsewhere = _rendered(stoker, *TWO, "--env", "HF_TOKEN", "--option", "secret=keys")["Job"]
    assert "'key': 'HF_TOKEN'" in str(elsewhere)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    refused = stoker(*TWO, "--env", "HF_TOKEN", "--dry-run")
    assert refused.code == 2
    assert "kubectl create secret generic NAME --from-literal=HF_TOKEN" in refused.err
    done = stoker(*TWO, "--env", "HF_TOKEN", "--option", "secret=keys", "--dry-run")
    assert "hf_planted" not in done.out
    assert "secretKeyRef" in done.out


def test_pods_are_followed_from_when_they_start_whenever_that_is(
    stoker: Command, start: Start, api: Api
) -> None:
    done = stoker(*TWO, "--json")
    label, (job,) = {"stoker/job": done.answer["job"]}, api.of_kind("Job")
    job["status"] = {"active": 2}
    follows = start("jobs", "logs", "a", "--follow")
    until(lambda: any(call.endswith("/pods") for call in api.calls), follows)
    api.add_pod("early", label, "", state="waiting")
    api.add_pod("first", label, "step 1\n")
    until(lambda: "GET /api/v1/namespaces/default/pods/first/log" in api.calls, follows)
    api.add_pod("second", label, "step 2\n", state="terminated")
    until(lambda: "GET /api/v1/namespaces/default/pods/second/log" in api.calls, follows)
    job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    out, err = follows.communicate(timeout=LONG)
    assert follows.returncode == 0, err.decode()
    assert out.decode().splitlines() == ["[first] step 1", "[second] step 2"]
    assert not any("/early/" in call for call in api.calls)


def test_it_is_submitted_seen_heard_and_cancelled(stoker: Command, api: Api, tmp_path: Path) -> None:
    done = stoker(*TWO, "--json")
    assert done.code == 0, done.err
    name, label = done.answer["native"], {"stoker/job": done.answer["job"]}
    (job,) = api.of_kind("Job")
    assert job["metadata"]["name"] == name
    assert [service["metadata"]["name"] for service in api.of_kind("Service")] == [name]

    def state() -> tuple[str, str | None]:
        (entry,) = stoker("jobs", "list", "--json").answer["jobs"]
        return entry["state"], entry["reason"]

    assert state() == ("queued", None)
    job["status"] = {"active": 2}
    assert state() == ("running", None)
    again = stoker(*TWO)
    assert again.code == 2
    assert "already trains this run and is running" in again.err
    api.add_pod(f"{name}-0-x", label, "step 1\nstep 2\n")
    said = stoker("jobs", "logs", "a")
    assert f"[{name}-0-x] step 2" in said.out, said.err
    nothing = stoker("jobs", "logs", "a", "--rank", "3")
    assert f"rank 3 has written nothing under {tmp_path / 'runs'} yet" in nothing.err
    logs = tmp_path / "runs" / "ranked" / "a" / "logs"  # as of a claim that is mounted here
    logs.mkdir(parents=True)
    (logs / "rank-3.log").write_text("step 3\n")
    assert stoker("jobs", "logs", "a", "--rank", "3").out == "[rank 3] step 3\n"
    job["status"] = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}
    assert state() == ("failed", "BackoffLimitExceeded")
    job["status"] = {"active": 2}
    ended = stoker("jobs", "cancel", "a")
    assert ended.code == 0, ended.err
    assert not api.of_kind("Job")
    assert not api.of_kind("Service")
    assert state() == ("cancelled", None)
    assert json.loads((tmp_path / "runs" / ".jobs" / done.answer["job"] / "job.json").read_text())[
        "cancelled"
    ]


def test_the_service_of_a_job_goes_with_it_whoever_deletes_that(stoker: Command, api: Api) -> None:
    done = stoker(*TWO, "--json")
    assert done.code == 0, done.err
    assert len(api.of_kind("Service")) == 1
    subprocess.run(["kubectl", "delete", f"job/{done.answer['native']}", "--wait=false"], check=True)
    assert not api.of_kind("Job")
    assert not api.of_kind("Service")


def test_whoever_submits_pods_is_told_that_they_run_the_code_of_their_image(
    stoker: Command, api: Api
) -> None:
    done = stoker(*TWO)
    assert "it runs the code in the image registry/train:1\n" in done.out, done.err


def test_what_a_cluster_cannot_run_is_answered_before_anything_is_written(
    stoker: Command, api: Api, tmp_path: Path
) -> None:
    more = stoker(*TWO, "--gpus", "16")
    assert more.code == 2, more.err
    assert "--gpus 16: a node of this cluster has at most 8 nvidia.com/gpu" in more.err
    api.allowed = False
    assert "may not create jobs.batch there" in stoker(*TWO).err
    assert not (tmp_path / "runs" / ".jobs").exists()
    assert not api.of_kind("Job")


def test_a_cluster_that_does_not_answer_is_not_one_that_forbids(
    stoker: Command, api: Api, tmp_path: Path
) -> None:
    api.close()
    done = stoker(*TWO)
    assert done.code == 2
    assert "no cluster answers kubectl (" in done.err
    assert "refused" in done.err
    assert "memcache.go" not in done.err  # kubectl's log of itself
    assert not (tmp_path / "runs" / ".jobs").exists()


def test_without_kubectl_it_says_so(stoker: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = stoker(*TWO)
    assert done.code == 2
    assert "kubectl not found" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--option", "claim=runs"), "--option image=NAME"),
        (("--option", "image=a"), "runs would be stored inside the pods"),
        (("--option", "image=a", "--option", "clam=runs"), "did you mean 'claim'"),
        (
            ("--option", "image=a", "--option", "claim=b", "--option", "kind=trainjbo"),
            "did you mean 'trainjob'",
        ),
        (("--option", "image=a", "--runs", "s3://b/r", "--nodes", "2"), "working copy of an object store"),
    ],
)
def test_what_cannot_be_a_job_of_pods_is_refused(given: tuple[str, ...], said: str, stoker: Command) -> None:
    done = stoker("train", RECIPE, "--on", "kubernetes", *given, "--dry-run")
    assert done.code == 2
    assert said in done.err


def test_controllers_of_a_study_are_an_indexed_job_of_which_each_may_fail_by_itself(stoker: Command) -> None:
    searched = str(Path(__file__).parents[1] / "cli" / "searched.py")
    (job,) = _rendered(
        stoker, "sweep", searched, "x=uniform(0, 1)", "--name", "s", "--on", "kubernetes",
        "--controllers", "3", "--storage", "postgresql+psycopg2://db/studies", "--retries", "2", *TWO[-4:],
    ).values()  # fmt: skip
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == (3, 3, 2)
    assert spec["podFailurePolicy"]["rules"][0]["action"] == "FailIndex"
    (container,) = spec["template"]["spec"]["containers"]
    assert "s-$(JOB_COMPLETION_INDEX)" in container["command"]
