"""The manifest of a job for Kubernetes: a plain Job, or Kubeflow's PyTorchJob or TrainJob.

A plain Job is the default and needs nothing installed in the cluster: one pod per node, each with an index;
they meet at the first one. A pod that is told to stop saves a checkpoint and ends with 75, and is started
again without counting as a failure; so is one that Kubernetes removed. Kubeflow's kinds start the ranks
with torchrun, as their operators do, and count a 75 as a failure.

The code is in a container image; runs are in an object store, or on a persistent volume.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from stoker.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, BadInput, nearest
from stoker.launch import arguments, jobspec, kubernetes_options
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec
from stoker.launch.kubernetes_options import RUNS, SELECTOR, SHARED_MEMORY
from stoker.launch.rounds import COMING
from stoker.words import parsed_size

_PATCHED = ("volumeMounts", "securityContext")
"""What a TrainJob has no setting for: a patch of the runtime's container."""
LABEL = "stoker/job"

_PORT = 29400
_CONTAINER = "train"
_WAIT_FOR_FIRST = (  # as the first process of a container, a shell ignores SIGTERM unless it has a trap
    "trap 'exit 143' TERM; waited=0; "
    "until getent hosts {host} || [ $waited -ge {seconds} ]; do sleep 1; waited=$((waited + 1)); done"
)
_TOLD_TO_TORCHRUN = ("--rendezvous", "--nodes", "--nproc", "--max-restarts")


def render(job: Job) -> str:
    """The manifest. Raises BadInput for invalid settings."""
    jobspec.check(job.spec)
    _check_options(job.spec)
    parts = _KINDS[kind_of(job.spec)](job)
    return "---\n".join(
        yaml.dump(part, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True) for part in parts
    )


class _Dumper(yaml.SafeDumper):
    """Repeats repeated values instead of using YAML references, as a person would."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _plain_job(job: Job) -> list[dict[str, Any]]:
    """A Job with one pod per node or element; and the Service through which nodes find each other."""
    spec, name = job.spec, name_of(job)
    pods = spec.elements or spec.nodes
    together = meets(spec)
    pod = _pod(
        job, _command(job, {RENDEZVOUS: f"{name}-0.{name}:{_PORT}", ELEMENT: "$(JOB_COMPLETION_INDEX)"})
    )
    pod["restartPolicy"] = "Never"
    if together:
        pod = {"subdomain": name, "initContainers": [_wait_for_first(spec, f"{name}-0.{name}")], **pod}
    made = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            # A failure of the run ends the pods of all nodes; a failure of an array element is its own.
            **(
                {"backoffLimitPerIndex": spec.retries}
                if spec.elements
                else {"backoffLimit": spec.retries * spec.nodes}
            ),
            **_deadline(spec),
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    _when_exit_code("FailIndex" if spec.elements else "FailJob", EXIT_BAD_INPUT),
                    _when_exit_code("Ignore", EXIT_PREEMPTED),
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"metadata": {"labels": _labels(job)}, "spec": pod},
        },
    }
    return [_service(job), made] if together else [made]


def _pytorch_job(job: Job) -> list[dict[str, Any]]:
    """Kubeflow's PyTorchJob: a master and workers, which the operator configures for torchrun."""
    spec = job.spec
    pod = _pod(job, _by_torchrun(job), container="pytorch")
    replica = {
        "restartPolicy": "OnFailure",
        "template": {"metadata": {"labels": _labels(job)}, "spec": pod},
    }
    replicas = {"Master": {"replicas": 1, **replica}}
    if spec.nodes > 1:
        replicas["Worker"] = {"replicas": spec.nodes - 1, **replica}
    policy = {"cleanPodPolicy": "Running", "backoffLimit": spec.retries, **_deadline(spec)}
    made = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "nprocPerNode": str(spec.processes),
            "runPolicy": policy,
            "pytorchReplicaSpecs": replicas,
        },
    }
    return [made]


def _train_job(job: Job) -> list[dict[str, Any]]:
    """Kubeflow's TrainJob: what to run, and a patch of the cluster's runtime for torch."""
    spec = job.spec
    pod = _pod(job, _by_torchrun(job), container="node")
    (container,) = pod.pop("containers")
    patch = {
        **pod,
        "containers": [{"name": "node", **{key: container[key] for key in _PATCHED if key in container}}],
    }
    trainer = {
        "image": container["image"],
        "command": container["command"],
        "env": container["env"],
        "numNodes": spec.nodes,
        "numProcPerNode": spec.processes,
        "resourcesPerNode": container["resources"],
    }
    template = {"metadata": {"labels": _labels(job)}, "spec": patch}
    made = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": spec.options.get("runtime", "torch-distributed"),
            },
            **_deadline(spec),
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "stoker",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [
                                    {"name": "node", "template": {"spec": {"template": template}}}
                                ]
                            }
                        }
                    },
                }
            ],
        },
    }
    return [made]


_KINDS: Mapping[str, Callable[[Job], list[dict[str, Any]]]] = {
    "job": _plain_job, "pytorchjob": _pytorch_job, "trainjob": _train_job,
}  # fmt: skip
RESOURCES = {
    "job": "jobs.batch", "pytorchjob": "pytorchjobs.kubeflow.org",
    "trainjob": "trainjobs.trainer.kubeflow.org",
}  # fmt: skip


def _service(job: Job) -> dict[str, Any]:
    """Gives each pod of the Job a name that the others can resolve, even before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL: job.id},
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }


def meets(spec: JobSpec) -> bool:
    """Whether the pods of a job must find each other."""
    return any(RENDEZVOUS in word for word in spec.command)


def _pod(job: Job, command: Sequence[str], *, container: str = _CONTAINER) -> dict[str, Any]:
    spec, options = job.spec, job.spec.options
    made: dict[str, Any] = {"terminationGracePeriodSeconds": kubernetes_options.grace(options)}
    if "priority-class" in options:
        made["priorityClassName"] = options["priority-class"]
    if "service-account" in options:
        made["serviceAccountName"] = options["service-account"]
    if "pull-secret" in options:
        made["imagePullSecrets"] = [{"name": options["pull-secret"]}]
    selected = {key.removeprefix(SELECTOR): v for key, v in options.items() if key.startswith(SELECTOR)}
    if selected:
        made["nodeSelector"] = selected
    tolerations = _tolerations(spec)
    if tolerations:
        made["tolerations"] = tolerations
    # Loader workers pass batches through shared memory, of which a container has 64 MiB by default.
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": SHARED_MEMORY}]
    if "claim" in options:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": options["claim"]}})
        mounts.append({"name": "runs", "mountPath": RUNS})
    secret, folder = kubernetes_options.files(options)
    if secret:
        volumes.append({"name": "secret-files", "secret": {"secretName": secret}})
        mounts.append({"name": "secret-files", "mountPath": folder, "readOnly": True})
    of_pod, of_container = _security(options)
    made |= of_pod
    made["containers"] = [
        {
            "name": container,
            "image": options["image"],
            "command": list(command),
            "env": _environment(spec),
            "resources": _resources(spec),
            "volumeMounts": mounts,
            **of_container,
        }
    ]
    made["volumes"] = volumes
    return made


def _security(options: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The security contexts of a pod and of each container: with a user, what the level `restricted` asks."""
    of_pod: dict[str, Any] = {}
    if "fs-group" in options:
        of_pod["fsGroup"] = int(options["fs-group"])
    if "user" not in options:
        return {"securityContext": of_pod} if of_pod else {}, {}
    of_pod |= {
        "runAsUser": int(options["user"]),
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    of_container = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {"securityContext": of_pod}, {"securityContext": of_container}


def _tolerations(spec: JobSpec) -> list[dict[str, Any]]:
    """The taints of nodes that pods accept: the usual one of GPUs, and those given."""
    found: list[dict[str, Any]] = []
    if spec.gpus:
        gpu = spec.options.get("gpu-resource", "nvidia.com/gpu")
        found.append({"key": gpu, "operator": "Exists", "effect": "NoSchedule"})
    asked = spec.options.get("toleration")
    for given in asked.split(",") if asked is not None else ():
        key, equals, value = given.partition("=")
        match = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
        found.append({"key": key, **match})
    return found


def _wait_for_first(spec: JobSpec, host: str) -> dict[str, Any]:
    """Pods start in any order, and a name resolves once its pod has an address.

    The first pod may also wait for a node, or have succeeded: after a while the launcher starts without it,
    and ends with 0 if the run has finished, otherwise with 75, so that its pod is replaced.
    """
    script = _WAIT_FOR_FIRST.format(host=host, seconds=round(COMING))
    return {
        "name": "wait-for-first",
        "image": spec.options["image"],
        "command": ["sh", "-c", _literal(script)],
        "resources": {amount: {"cpu": "100m", "memory": "64Mi"} for amount in ("requests", "limits")},
        **_security(spec.options)[1],
    }


def _environment(spec: JobSpec) -> list[dict[str, Any]]:
    given = {"OMP_NUM_THREADS": str(spec.threads), **spec.environment}
    if "claim" in spec.options and _store(spec):  # what all nodes must share
        given.setdefault("STOKER_CACHE", f"{RUNS}/.cache")
    found: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in given.items()]
    for name in spec.passed:
        known = {"name": spec.options["secret"], "key": name}
        found.append({"name": name, "valueFrom": {"secretKeyRef": known}})
    return found


def _resources(spec: JobSpec) -> dict[str, Any]:
    """Memory, disk and GPUs are also limits; of cores, a pod may use idle ones."""
    hard: dict[str, Any] = {}
    if spec.memory is not None:
        hard["memory"] = jobspec.shown_memory(spec.memory) + "i"
    if disk := parsed_size(spec.options.get("ephemeral-storage", "")):
        hard["ephemeral-storage"] = jobspec.shown_memory(disk) + "i"
    if spec.gpus:
        hard[spec.options.get("gpu-resource", "nvidia.com/gpu")] = str(spec.gpus)
    requests = {"cpu": str(spec.cores), **hard}
    return {"requests": requests, **({"limits": hard} if hard else {})}


def _command(job: Job, known: Mapping[str, str]) -> list[str]:
    """The command as a container runs it: with the image's Python, and the runs' place in it.

    Args:
        known: the values of the placeholders in a pod.
    """
    words = ["python", *(_relative(word, job.spec.folder) for word in job.spec.command[1:])]
    if "claim" in job.spec.options and not _store(job.spec):
        words = [*arguments.without(words, ["--runs"]), "--runs", RUNS]
    placeholders = "|".join(map(re.escape, (RENDEZVOUS, ELEMENT)))
    pieces = ([known.get(p) or _literal(p) for p in re.split(f"({placeholders})", word)] for word in words)
    return ["".join(parts) for parts in pieces]


def _by_torchrun(job: Job) -> list[str]:
    """The command under torchrun, which takes the number and address of ranks from variables."""
    restarts = arguments.value(job.spec.command, "--max-restarts")
    words = arguments.without(_command(job, {}), _TOLD_TO_TORCHRUN)
    return ["torchrun", *([f"--max-restarts={restarts}"] if restarts else []), *words[1:]]


def _relative(word: str, folder: Path) -> str:
    """A script below the working directory, relative to it: the image has the same working directory."""
    path = Path(word)
    return str(path.relative_to(folder)) if path.is_absolute() and path.is_relative_to(folder) else word


def _literal(text: str) -> str:
    """Escape `$`: Kubernetes replaces `$(NAME)` with a variable, and `$$` with `$`."""
    return text.replace("$", "$$")


def _when_exit_code(action: str, code: int) -> dict[str, Any]:
    return {
        "action": action,
        "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [code]},
    }


def _deadline(spec: JobSpec) -> dict[str, Any]:
    return {"activeDeadlineSeconds": round(spec.time)} if spec.time is not None else {}


def _metadata(job: Job) -> dict[str, Any]:
    options = job.spec.options
    labels = _labels(job)
    if "queue" in options:
        labels["kueue.x-k8s.io/queue-name"] = options["queue"]
    where = {"namespace": options["namespace"]} if "namespace" in options else {}
    return {"name": name_of(job), **where, "labels": labels}


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "stoker", LABEL: job.id}


def name_of(job: Job) -> str:
    """A valid Kubernetes name, even with a pod's number appended (RFC 1123: 63 characters).

    It begins with a letter, as that of a Service must (RFC 1035).
    """
    words = re.sub(r"[^a-z0-9]+", "-", job.spec.name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    mark = re.sub(r"[^a-z0-9]", "", job.id.lower())[-6:]
    return f"{words[:40].rstrip('-')}-{mark}"


def kind_of(spec: JobSpec) -> str:
    """Raises BadInput."""
    kind = spec.options.get("kind", "job").lower()
    if kind not in _KINDS:
        raise BadInput(f"--option kind={kind}: must be one of {', '.join(_KINDS)}{nearest(kind, _KINDS)}")
    return kind


def _check_options(spec: JobSpec) -> None:
    """Raises BadInput."""
    kubernetes_options.check(spec.options)
    if not spec.options.get("image"):
        raise BadInput(
            "--option image=NAME is missing: pods run an image that contains stoker and your code; `stoker "
            "package` writes a Dockerfile for one"
        )
    if not _store(spec) and "claim" not in spec.options:
        raise BadInput(
            "runs would be stored inside the pods and be lost with them: give --runs s3://bucket/folder, or "
            "--option claim=NAME, a persistent volume claim"
        )
    if _store(spec) and spec.nodes > 1 and "claim" not in spec.options:
        raise BadInput(
            "several nodes share the working copy of an object store: give --option claim=NAME, a persistent "
            "volume claim that all of them can write to (ReadWriteMany)"
        )
    if spec.passed and "secret" not in spec.options:
        keys = " ".join(f'--from-literal={name}="${name}"' for name in spec.passed)
        raise BadInput(
            f"--env {spec.passed[0]}: its value is not written to a file, so pods need it from a Secret: run "
            f"kubectl create secret generic NAME {keys}, then add --option secret=NAME"
        )
    if kind_of(spec) != "job" and spec.elements:
        raise BadInput("several controllers need kind=job: omit kind, or --controllers")
    if kind_of(spec) == "trainjob" and spec.retries:
        raise BadInput(
            f"--retries {spec.retries}: a TrainJob has no such setting, its runtime decides; use "
            "--max-restarts, with which torchrun restarts the ranks, or omit kind"
        )
    if kind_of(spec) == "trainjob" and "priority-class" in spec.options:
        raise BadInput("--option priority-class: a TrainJob has no such setting, its runtime decides")


def _store(spec: JobSpec) -> str:
    """The URL of the runs; empty if they are in a folder."""
    url = arguments.value(spec.command, "--runs")
    return url if "://" in url else ""
