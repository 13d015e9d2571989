"""Jobs on a Ray cluster, as Ray jobs: an entrypoint that starts a launcher on each node (`ray_nodes`).

The cluster's machines must have this environment and these folders, as with Slurm; or the folder is
uploaded, with `--option working-dir=.`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import object_store, ray_cluster
from stoker.errors import BadInput, StokerError, nearest
from stoker.launch import arguments, job_uploader, jobs, jobspec, tail
from stoker.launch.jobs import Job
from stoker.launch.jobspec import RENDEZVOUS, JobSpec, Nodes
from stoker.launch.ray_nodes import MEETING
from stoker.launch.targets import Line, Status
from stoker.reproduce import shipped
from stoker.run import finding

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger("stoker")

SUBMITTED = "job.submitted.json"

_FORGOTTEN = "not found in the cluster"

_QUIET = {  # what Ray says of a job that is submitted, and at the end of its log
    "ray.dashboard.modules.job.sdk": logging.WARNING,
    "ray.dashboard.modules.dashboard_sdk": logging.WARNING,
    "ray._private.runtime_env.packaging": logging.WARNING,
    "ray._private.runtime_env.working_dir": logging.ERROR,  # .git, which is packed in another way
}
_STARTS = 30.0  # seconds that a newly started cluster may need until it accepts jobs
_STOP = 120  # seconds that a job has for a checkpoint after being told to stop
_OPTIONS = {
    "address": "the cluster's dashboard, such as http://head:8265; default: RAY_API_SERVER_ADDRESS",
    "working-dir": "a folder to upload to the cluster, in which the command then runs",
    "scales": "true: the cluster adds nodes when asked, so the nodes that it has now are no limit",
}
_IF_IT_SCALES = "if it adds nodes when asked, add --option scales=true"
_STATES = {
    "PENDING": "queued", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed",
    "STOPPED": "cancelled",
}  # fmt: skip


# -- what a target does ----------------------------------------------------------------------


def check(job: Job) -> None:
    """Check that a cluster answers, and has such nodes or scales. Raises BadInput, StokerError."""
    _warn_of_copies(job)
    client = _client(job.spec)
    known = _nodes(client)
    if known and job.spec.options.get("scales") != "true":
        jobspec.check_room(job.spec, known, "this cluster", _IF_IT_SCALES)


def render(job: Job) -> str:
    """The job as Ray receives it, as JSON. Raises BadInput for invalid settings."""
    jobspec.check(job.spec)
    _check_options(job.spec)
    _check_runs(job.spec)
    return json.dumps(_submission(job), indent=2) + "\n"


def code(job: Job) -> str:
    """A description of the code that a job runs."""
    sent = _sent(job.spec)
    if "://" in sent:
        return f"the code in {sent}"
    if sent:
        return f"the present code in {sent}, which was sent to the cluster"
    return f"the code in {job.spec.folder} at the time it starts"


def submit(job: Job, rendered: str) -> str:
    """Submit a job; returns Ray's id for it. Raises StokerError."""
    jobs.begin(job, SUBMITTED, rendered)
    client, until = _client(job.spec), time.monotonic() + _STARTS
    while True:
        try:
            return str(client.submit_job(**json.loads(rendered)))
        except (RuntimeError, OSError) as error:
            if "No available agent" in str(error) and time.monotonic() < until:
                time.sleep(1)
                continue
            jobs.forget(job)
            raise StokerError(f"the cluster did not accept the job: {error}") from error


def states(of: Sequence[Job]) -> dict[str, Status]:
    """The states of jobs, by `Job.id`. Raises StokerError if the cluster does not answer."""
    found = {}
    for job in of:
        try:
            known = _client(job.spec).get_job_info(job.native)
        except RuntimeError as error:
            if "404" not in str(error):
                raise StokerError(f"the cluster does not answer: {error}") from error
            found[job.id] = Status("cancelled" if job.cancelled else "unknown", _FORGOTTEN)
            continue
        state = _STATES[str(known.status.value)]
        why = _why(known.message or "") if state == "failed" else ""
        found[job.id] = Status("cancelled" if job.cancelled and state == "failed" else state, why)
    return found


def ended(of: Sequence[Job]) -> dict[str, Status]:
    """Nothing: only the cluster knows how a job ended."""
    return {}


def cancel(job: Job, *, at_once: bool) -> None:
    """Tell a job to stop after a checkpoint; with `at_once`, end its launchers immediately.

    Raises BadInput, StokerError.
    """
    client = _client(job.spec)
    try:
        client.stop_job(job.native)
        if at_once:
            words = [job.spec.command[0], "-m", "stoker.launch.ray_end", job.native]
            client.submit_job(
                entrypoint=shlex.join(words), submission_id=f"{job.native}-now-{secrets.token_hex(2)}"
            )
    except (RuntimeError, OSError) as error:
        raise StokerError(f"the cluster did not stop {job.native}: {error}") from error


def lines(job: Job, *, follow: bool) -> Iterator[Line]:
    """The output of the launchers, from Ray, or else from the object store; and that of the ranks."""
    stored, why = tail.Logs(job, nodes=True), _why_not_kept(job)
    if why and stored.text(job_uploader.KEPT):
        log.warning("%s; showing the logs that were uploaded to %s", why, finding.shown(job.runs))
        for line in tail.lines(stored):
            yield _line(line.text) if line.source == Path(job_uploader.KEPT).stem else line
        return

    def over() -> bool:
        return states([job])[job.id].over

    logs = tail.Logs(job, nodes=False)
    of_ranks = tail.lines(logs, logs.until(over) if follow else None)
    yield from tail.together(_of_nodes(job, follow), of_ranks)


def _why_not_kept(job: Job) -> str:
    """Why Ray does not have a job's output; empty if it does."""
    try:
        status = states([job])[job.id]
    except StokerError as error:
        return str(error)
    return status.reason if status.reason == _FORGOTTEN else ""


def _of_nodes(job: Job, follow: bool) -> Iterator[Line]:
    client = _client(job.spec)
    if not follow:
        yield from map(_line, client.get_job_logs(job.native).splitlines())
        return
    for text in _followed(client, job.native):
        yield from map(_line, text.splitlines())


# -- the job ---------------------------------------------------------------------------------


def _submission(job: Job) -> dict[str, Any]:
    """The arguments of `JobSubmissionClient.submit_job`."""
    spec = job.spec
    sent = _sent(spec)
    numbers = {
        "nodes": spec.nodes,
        "cpus": spec.cores,
        "gpus": spec.gpus,
        "memory": spec.memory,
        "retries": spec.retries,
    }
    native = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', spec.name)}-{job.id[-4:]}"
    flags = ["--name", native]
    flags += [word for name, number in numbers.items() if number for word in (f"--{name}", str(number))]
    flags += [] if sent else ["--folder", str(spec.folder)]
    store = object_store.of(job.runs)
    flags += ["--logs", store.url, job.id] if store is not None else []
    command = [MEETING if word == RENDEZVOUS else word for word in _limited(spec)]
    words = [spec.command[0], "-m", "stoker.launch.ray_nodes", *flags, "--", *command]
    variables = {
        "OMP_NUM_THREADS": str(spec.threads), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP), "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0", **spec.environment,
    }  # fmt: skip
    environment: dict[str, Any] = {"env_vars": variables}
    if sent:
        environment["working_dir"] = sent
    if sent and "://" not in sent and (record := shipped.packed(Path(sent), job.runs)):
        variables[shipped.RECORD] = record  # as Ray does not send .git
    return {
        "entrypoint": shlex.join(words),
        "submission_id": native,
        "runtime_env": environment,
        "metadata": {"stoker-job": job.id},
    }


def _sent(spec: JobSpec) -> str:
    """The folder that is sent to the cluster, or the URL of one that it fetches; empty for neither."""
    sent = spec.options.get("working-dir", "")
    return str((spec.folder / sent).resolve()) if sent and "://" not in sent else sent


def _warn_of_copies(job: Job) -> None:
    """Warn that several nodes must share the working copy of a store: where it is, only they know."""
    if job.spec.nodes > 1 and object_store.of(job.runs) and "STOKER_CACHE" not in job.spec.environment:
        log.warning(
            "the nodes must share the working copy of %s, which is in STOKER_CACHE or else ~/.cache/stoker: "
            "if that is not on a disk that they share, add --env STOKER_CACHE=FOLDER with one that is",
            finding.shown(job.runs),
        )


def _limited(spec: JobSpec) -> tuple[str, ...]:
    """The command with the job's time limit: Ray has none, so the run ends itself, and is started again."""
    if spec.time is None:
        return spec.command
    if arguments.has(spec.command, "--max-time"):
        raise BadInput("--time and --max-time: on ray they are the same; give only one of them")
    return (*spec.command, "--max-time", f"{round(spec.time)}s")


def _check_options(spec: JobSpec) -> None:
    """Raises BadInput."""
    for key in spec.options:
        if key not in _OPTIONS:
            known = "; ".join(f"{name}: {what}" for name, what in _OPTIONS.items())
            raise BadInput(
                f"--option {key}: no such setting{nearest(key, _OPTIONS)}; the settings are {known}"
            )
    if (scales := spec.options.get("scales", "false")) not in ("true", "false"):
        raise BadInput(f"--option scales={scales}: must be true or false")
    sent = spec.options.get("working-dir", "")
    if "working-dir" in spec.options and "://" not in sent and not (spec.folder / sent).is_dir():
        raise BadInput(f"--option working-dir={sent}: the folder does not exist")
    if spec.passed:
        raise BadInput(
            f"--env {spec.passed[0]}: Ray shows the variables of a job on its dashboard; set it instead "
            "on the machines, before Ray is started"
        )


def _check_runs(spec: JobSpec) -> None:
    """Raises BadInput if the runs would be in the folder that Ray makes of the one that is sent."""
    sent = spec.options.get("working-dir")
    runs = arguments.value(spec.command, "--runs") or spec.environment.get("STOKER_RUNS", "")
    if sent and "://" not in runs and not Path(runs).is_absolute():
        raise BadInput(
            f"--option working-dir={sent}: runs would be stored in a folder of Ray's on some node, and be "
            "lost with it: give --runs s3://bucket/folder, or the absolute path of a folder that all nodes "
            "share"
        )


# -- the cluster -----------------------------------------------------------------------------


def _client(spec: JobSpec) -> JobSubmissionClient:
    """Raises BadInput if Ray is not installed, or nothing answers there."""
    ray_cluster.require()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    try:
        return JobSubmissionClient(spec.options.get("address"))
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        if (asked := ray_cluster.asked_for(error)) is not None:
            raise asked from error
        first = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"no Ray cluster answers {_where(spec)} ({first}): give its dashboard's address with --option "
            "address=http://HOST:8265; --dry-run prints the job anywhere"
        ) from error


def _where(spec: JobSpec) -> str:
    """Where a cluster is looked for, in Ray's order."""
    if "address" in spec.options:
        return f"at {spec.options['address']}"
    named = (name for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if os.environ.get(name))
    return next((f"at {name}={os.environ[name]}" for name in named), "on this machine, and no address is set")


def _nodes(client: JobSubmissionClient) -> list[Nodes]:
    """The nodes of the cluster; empty if they are not known."""
    from ray.util.state import list_nodes

    with contextlib.suppress(Exception):  # a different version of Ray, or no permission
        found = list_nodes(address=client.get_address(), detail=True, raise_on_missing_output=False)
        has = [node.resources_total for node in found if node.state == "ALIVE"]
        return [Nodes(1, *(int(of.get(name, 0)) for name in ("GPU", "CPU", "memory"))) for of in has]
    return []


def _followed(client: JobSubmissionClient, native: str) -> Iterator[str]:
    """The output of a job, until it ends."""
    loop = asyncio.new_event_loop()
    written: AsyncIterator[str] = client.tail_job_logs(native)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(written))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _why(message: str) -> str:
    """Ray's reason for a job's failure, without the end of its log."""
    code = re.search(r"exit code -?\d+", message)
    return code[0] if code else message.strip().partition("\n")[0]


def _line(text: str) -> Line:
    """Parse `(node 1 pid=734, ip=10.0.0.7) step 20` as a line of that node."""
    match = re.fullmatch(r"\((node \d+) pid=[^)]*\) ?(.*)", text)
    return Line(match[1], match[2]) if match else Line("job", text)
