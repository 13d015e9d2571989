"""Jobs on Kubernetes: submitted, followed, cancelled; their manifest is made by `kubernetes_manifest`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stoker.errors import BadInput, StokerError
from stoker.launch import client, jobs, kubernetes_manifest, tail
from stoker.launch.jobs import Job
from stoker.launch.jobspec import JobSpec
from stoker.launch.kubernetes_manifest import LABEL, RESOURCES, kind_of, meets, name_of
from stoker.launch.targets import Line, Status

log = logging.getLogger("stoker")

MANIFEST = "manifest.yaml"
_OF_LOG = re.compile(r"[IWEF]\d{4} \d{2}:\d{2}:\d{2}")
"""The beginning of a line of klog, with which kubectl logs what it does."""

_NEEDS = "it must be on the PATH, with access to a cluster; --dry-run prints the manifest anywhere"


# -- what a target does ----------------------------------------------------------------------


def check(job: Job) -> None:
    """Check that kubectl is here, and may create such a job. Raises BadInput, StokerError."""
    kind = kind_of(job.spec)
    done = _kubectl(["auth", "can-i", "create", RESOURCES[kind], *_namespace(job.spec)])
    answer = done.stdout.strip()
    if answer.startswith("no"):
        raise BadInput(f"kubectl may not create {RESOURCES[kind]} there: {_reason(done) or answer}")
    if answer != "yes":
        raise BadInput(
            f"no cluster answers kubectl ({_reason(done) or done.returncode}): set KUBECONFIG, or check "
            "`kubectl config get-contexts`; --dry-run prints the manifest anywhere"
        )
    if job.spec.gpus:
        _check_nodes(job.spec)


def render(job: Job) -> str:
    """The manifest. Raises BadInput for invalid settings."""
    return kubernetes_manifest.render(job)


def code(job: Job) -> str:
    """A description of the code that a job runs."""
    return f"the code in the image {job.spec.options['image']}"


def submit(job: Job, rendered: str) -> str:
    """Submit the manifest; returns the job's name in the cluster. Raises StokerError."""
    manifest = jobs.begin(job, MANIFEST, rendered)
    done = _kubectl(["create", "--filename", str(manifest)])
    if done.returncode != 0:
        _kubectl(["delete", "--ignore-not-found", "--filename", str(manifest)])  # the part that was created
        jobs.forget(job)
        raise StokerError(f"the cluster did not accept the job: {_reason(done)}")
    if meets(job.spec) and kind_of(job.spec) == "job":
        _own_service(job)
    return name_of(job)


def states(of: Sequence[Job]) -> dict[str, Status]:
    """The states of jobs, by `Job.id`. Raises StokerError if the cluster does not answer."""
    found = {}
    for job in of:
        done = _kubectl(["get", *_resource(job), "--output", "json", "--ignore-not-found"])
        if done.returncode != 0:
            raise StokerError(f"kubectl get {job.native}: {_reason(done)}")
        known = json.loads(done.stdout) if done.stdout.strip() else None
        found[job.id] = _status(job, known)
    return found


def ended(of: Sequence[Job]) -> dict[str, Status]:
    """Nothing: only the cluster knows how a job ended."""
    return {}


def cancel(job: Job, *, at_once: bool) -> None:
    """End a job for good: its pods are told to stop, and are not started again. Raises StokerError."""
    done = _kubectl(
        ["delete", "--filename", str(job.folder / MANIFEST), "--ignore-not-found", "--wait=false"]
    )
    if at_once:
        of_job = ["--selector", f"{LABEL}={job.id}", *_namespace(job.spec)]
        _kubectl(["delete", "pods", *of_job, "--grace-period=0", "--force", "--wait=false"])
    if done.returncode != 0:
        raise StokerError(f"kubectl delete {name_of(job)}: {_reason(done)}")


def lines(job: Job, *, follow: bool) -> Iterator[Line]:
    """The output of the pods, as the cluster keeps it; and that of the ranks."""

    def over() -> bool:
        return states([job])[job.id].over

    logs = tail.Logs(job, nodes=False)
    if follow:
        of_ranks = tail.lines(logs, logs.until(over))
        yield from tail.together(of_ranks, more=_of_starting_pods(job, over))
    else:
        of_pods = _written(job, "--selector", f"{LABEL}={job.id}", "--max-log-requests=64")
        yield from tail.together(of_pods, tail.lines(logs))


def _of_starting_pods(job: Job, over: Callable[[], bool]) -> Callable[[], list[Iterator[Line]] | None]:
    """Returns the outputs of pods that have started since the last call; None once the job is over.

    `kubectl logs` with a selector ends with an error if a pod is still starting, and follows none that comes
    later.
    """
    known: set[tuple[str, int]] = set()

    def more() -> list[Iterator[Line]] | None:
        ended = over()
        new = _started(job) - known
        known.update(new)
        outputs = [_written(job, f"pod/{name}", "--follow") for name, _ in sorted(new)]
        return None if ended and not outputs else outputs

    return more


def _started(job: Job) -> set[tuple[str, int]]:
    """The pods whose container has started, with how often it was restarted in them."""
    of_job = ["--selector", f"{LABEL}={job.id}", *_namespace(job.spec)]
    done = _kubectl(["get", "pods", *of_job, "--output", "json"])
    found = set()
    for pod in json.loads(done.stdout)["items"] if done.returncode == 0 else ():
        containers = pod["status"].get("containerStatuses", [])
        if any({"running", "terminated"} & container["state"].keys() for container in containers):
            restarts = sum(container["restartCount"] for container in containers)
            found.add((pod["metadata"]["name"], restarts))
    return found


def _written(job: Job, *of: str) -> Iterator[Line]:
    """What `kubectl logs` has of some pods."""
    command = ["logs", *of, "--prefix", "--all-containers", "--tail=-1", *_namespace(job.spec)]
    with subprocess.Popen(
        ["kubectl", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield _line(line.rstrip("\n"))
        finally:
            process.terminate()


def _line(text: str) -> Line:
    """`[pod/digits-a1-0-x7k2p/train] step 20` as a line of that pod."""
    match = re.fullmatch(r"\[pod/([^/]+)/[^\]]+\] ?(.*)", text)
    return Line(match[1], match[2]) if match else Line("kubectl", text)


# -- kubectl ---------------------------------------------------------------------------------


def _check_nodes(spec: JobSpec) -> None:
    """Refuse more GPUs than any node has, unless none has any: a cluster may add such nodes when asked.

    Raises BadInput.
    """
    resource = spec.options.get("gpu-resource", "nvidia.com/gpu")
    done = _kubectl(["get", "nodes", "--output", "json"])
    if done.returncode != 0:  # not everybody may list nodes
        return
    nodes = json.loads(done.stdout)["items"]
    most = max((int(node["status"].get("allocatable", {}).get(resource, 0)) for node in nodes), default=0)
    if nodes and spec.gpus > most == 0:
        log.warning("no node has %s now: the pods wait until the cluster adds one that has", resource)
    elif nodes and spec.gpus > most:
        raise BadInput(f"--gpus {spec.gpus}: a node of this cluster has at most {most} {resource}")


def _own_service(job: Job) -> None:
    """Make the cluster remove the Service with its Job, whoever deletes that; not essential."""
    name, where = name_of(job), _namespace(job.spec)
    known = _kubectl(["get", f"{RESOURCES['job']}/{name}", "--output", "jsonpath={.metadata.uid}", *where])
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": known.stdout.strip()}
    patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
    done = _kubectl(["patch", f"service/{name}", "--type", "merge", "--patch", patch, *where])
    if done.returncode != 0:
        log.warning(
            "the service %s will not be removed if the job is deleted without stoker: %s", name, _reason(done)
        )


def _kubectl(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises BadInput if kubectl is not found, StokerError if nothing answers."""
    return client.call(["kubectl", *command], _NEEDS)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The reason why kubectl failed, without the lines of its own log."""
    return "; ".join(line for line in done.stderr.splitlines() if line and not _OF_LOG.match(line))


def _namespace(spec: JobSpec) -> list[str]:
    return ["--namespace", spec.options["namespace"]] if "namespace" in spec.options else []


def _resource(job: Job) -> list[str]:
    return [f"{RESOURCES[kind_of(job.spec)]}/{job.native}", *_namespace(job.spec)]


_ENDED = {"Complete": "done", "Succeeded": "done", "SuccessCriteriaMet": "done", "Failed": "failed",
          "FailureTarget": "failed"}  # fmt: skip


def _status(job: Job, known: Mapping[str, Any] | None) -> Status:
    """The state of a job from its object, of any kind; None means that it was deleted."""
    if known is None:
        return Status("cancelled") if job.cancelled else Status("unknown", "not found in the cluster")
    said = known.get("status") or {}
    for condition in said.get("conditions") or []:
        if condition.get("status") == "True" and condition.get("type") in _ENDED:
            state = _ENDED[condition["type"]]
            why = condition.get("reason", "") if state == "failed" else ""
            return Status(state, why)
    active = said.get("active") or sum(
        (replica.get("active") or 0)
        for replica in [*(said.get("replicaStatuses") or {}).values(), *(said.get("jobsStatus") or [])]
    )
    if (known.get("spec") or {}).get("suspend"):
        return Status("queued", "suspended")
    return Status("running") if active else Status("queued")
