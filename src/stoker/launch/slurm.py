"""Jobs on Slurm: submitted, followed, cancelled; their script is made by `slurm_script`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stoker import duration, object_store
from stoker.errors import EXIT_BAD_INPUT, BadInput, StokerError
from stoker.launch import client, jobs, jobspec, slurm_script, slurm_variables, tail
from stoker.launch.jobs import Job
from stoker.launch.jobspec import JobSpec, Nodes
from stoker.launch.targets import Line, Status
from stoker.object_store import Unreachable

SCRIPT = "script.sh"

log = logging.getLogger("stoker")

_FORGOTTEN = "Invalid job id"  # squeue's error for a job that ended long ago
_FINISHED = ("already finished", "No error")  # what scontrol says of an array's elements if one is over
_QUIET = 120  # seconds without a line after which a cancelled job counts as killed
_AT_ONCE = 8  # requests to a store

_NEEDS = (
    "Slurm's commands must be on the PATH; log in to a machine that has them. --dry-run prints the script "
    "anywhere"
)
_ELSEWHERE = "another partition may have more: --option partition=NAME"
_STATES = {
    "PENDING": "queued", "REQUEUED": "queued", "REQUEUE_FED": "queued", "REQUEUE_HOLD": "queued",
    "SPECIAL_EXIT": "queued", "CONFIGURING": "queued", "RESV_DEL_HOLD": "queued", "SUSPENDED": "suspended",
    "STOPPED": "suspended", "RUNNING": "running", "RESIZING": "running", "SIGNALING": "running",
    "COMPLETING": "ending", "STAGE_OUT": "ending", "COMPLETED": "done", "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}  # fmt: skip
"""Slurm's states in our terms; all others are `failed`, with Slurm's word as the reason."""
_MOST_TELLING = ("running", "ending", "suspended", "queued", "failed", "cancelled", "unknown", "done")
"""The first of these that any element of an array has is the array's state."""


def check(job: Job) -> None:
    """Ask Slurm whether it could ever run a job. Raises BadInput."""
    if shutil.which("sbatch") is None:
        raise client.not_found("sbatch", _NEEDS)
    for variable in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        if os.environ.get(variable):
            raise BadInput(f"{variable} is set: {slurm_script.ONE_CLUSTER}; unset it")
    _check_partition(job.spec)
    done = _sbatch(job, "--test-only", given=render(job))
    if done.returncode != 0:
        raise BadInput(f"sbatch refuses the job: {_reason(done)}")


def render(job: Job) -> str:
    """The sbatch script. Raises BadInput for invalid settings."""
    return slurm_script.render(job)


def code(job: Job) -> str:
    """A description of the code that a job runs."""
    return f"the code in {job.spec.folder} at the time it starts"


def submit(job: Job, rendered: str) -> str:
    """Submit the script; returns the job's number. Raises StokerError."""
    script = jobs.begin(job, SCRIPT, rendered)
    done = _sbatch(job, "--parsable", str(script))
    if done.returncode != 0:
        jobs.forget(job)
        raise StokerError(f"sbatch did not accept the job: {_reason(done)}")
    return done.stdout.strip().partition(";")[0]


def states(of: Sequence[Job]) -> dict[str, Status]:
    """The states of jobs, by `Job.id`: from squeue, else sacct, else what their scripts have written."""
    numbers = [job.native for job in of]
    known = _queue(numbers)
    missing = [number for number in numbers if number not in known]
    known |= _accounting(missing) if missing else {}
    forgotten = _by_attempts([job for job in of if job.native not in known])
    return {job.id: _status(job, known.get(job.native) or forgotten[job.id]) for job in of}


def ended(of: Sequence[Job]) -> dict[str, Status]:
    """The states of jobs that have ended according to their scripts' records, without asking Slurm."""
    found = {}
    for job, elements in zip(of, _written(of), strict=True):
        silent = [""] * (max(1, job.spec.elements) - len(elements))
        if all(_is_over(job, one) for one in (*elements, *silent)):
            found[job.id] = _status(job, _by_codes(elements))
    return found


def cancel(job: Job, *, at_once: bool) -> None:
    """End a job for good. Raises StokerError."""
    if at_once:
        _do(["scancel", job.native])
        return
    command = ["scontrol", "update", f"JobId={job.native}", "Requeue=0"]
    refused = _refusals(_call(command))
    _do(["scancel", "--state=PENDING", job.native])
    training, others = _allocated(job.native)
    if training:
        _do(["scancel", "--state=RUNNING", "--signal=TERM", *training])
    if others:  # no launcher can get the signal: nothing has started, or all processes are stopped
        _do(["scancel", *others])
    if refused:
        raise StokerError(f"{shlex.join(command)}: {refused}; cancel the job again")


def lines(job: Job, *, follow: bool) -> Iterator[Line]:
    """The output of the nodes' launchers and the ranks."""
    logs = tail.Logs(job, nodes=True)
    silent = False

    def over() -> bool:
        nonlocal silent
        try:
            return states([job])[job.id].over
        except BadInput:  # Slurm's commands are not installed here
            if object_store.of(job.runs) is None:
                raise
            known = jobs.find(job.runs, job.id)
            attempts = logs.text(slurm_script.ATTEMPTS)
            return _is_over(known, attempts) or (known.cancelled and logs.quiet > _QUIET)
        except StokerError as error:
            if not silent:
                log.warning("%s; still following the logs", error)
            silent = True
            return False

    return tail.lines(logs, logs.until(over) if follow else None)


# -- checks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Partition:
    """Equal nodes of a partition, and what holds for all of it."""

    up: bool
    limit: float
    """Seconds that a job may take."""
    nodes: Nodes


def _check_partition(spec: JobSpec) -> None:
    """Raises BadInput for what the partition cannot run: no node has it, or no job may take so long."""
    name = spec.options.get("partition") or os.environ.get("SBATCH_PARTITION", "")
    rows = _partition(name)
    if not rows:
        return
    where = f"partition {name}" if name else "the default partition"
    jobspec.check_room(spec, [row.nodes for row in rows], where, _ELSEWHERE)
    most = max(row.limit for row in rows)
    by_qos = "qos" in spec.options or "SBATCH_QOS" in os.environ  # one may replace the partition's limit
    if spec.time is not None and spec.time > most and not by_qos:
        asked, allowed = map(duration.shown_clock, (spec.time, most))
        said = (
            f"--time {asked}: a job of {where} may take {allowed}, so it would be queued forever; use --time "
            f"{allowed}, after which it resumes, or another partition: --option partition=NAME"
        )
        if name:
            raise BadInput(said)
        log.warning("%s", said)  # this site may choose partitions by itself
    if not any(row.up for row in rows):
        log.warning("%s is down: the job waits until it is up again", where)


def _partition(name: str) -> list[_Partition]:
    """The nodes of a partition, or of the default one; empty if Slurm does not say."""
    flags = [f"--partition={name}"] if name else []
    done = _call(["sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%D|%c|%m|%G", *flags])
    rows = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
    return [
        _Partition(up == "up", _limit(limit), Nodes(int(count), _gpus(gres), int(cpus), int(memory) * 2**20))
        for partition, up, limit, count, cpus, memory, gres in rows
        if name or partition.endswith("*")
    ]


def _limit(text: str) -> float:
    """Seconds, from `30:00`, `4:00:00`, `1-00:00:00` or `infinite`."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):
        return math.inf
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86400 + seconds


def _gpus(resources: str) -> int:
    """The number of GPUs in `gpu:a100:4(S:0-1),gpu:t4:2,nvme:1`."""
    found = re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources)
    return sum(map(int, found))


# -- Slurm's commands ----------------------------------------------------------------------


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises BadInput if it or Slurm's configuration is not found, StokerError if
    nothing answers.
    """
    _check_configuration()
    return client.call(command, _NEEDS, environment=slurm_variables.for_others(os.environ))


def _check_configuration() -> None:
    """Raises BadInput if it is not where SLURM_CONF says: Slurm's commands look for it for a minute."""
    file = os.environ.get("SLURM_CONF", "")
    if file and not Path(file).exists():
        raise BadInput(
            f"SLURM_CONF={file}: no such file, so Slurm has no configuration here; unset it, or log in to a "
            "machine that has one"
        )


def _sbatch(job: Job, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run sbatch for a job. Raises like `_call`."""
    return client.call(["sbatch", *arguments], _NEEDS, given, slurm_script.variables(job))


def _do(command: Sequence[str]) -> None:
    """Run a command that must succeed. Raises StokerError."""
    done = _call(command)
    if done.returncode != 0:
        raise StokerError(f"{shlex.join(command)}: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The reason why a command failed."""
    words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
    return "; ".join(word for word in words if word) or f"exit code {done.returncode}"


def _refusals(done: subprocess.CompletedProcess[str]) -> str:
    """Why scontrol did not change a job that has not ended; empty if it changed each element that has not."""
    lines = done.stderr.splitlines()
    if done.returncode == 0 or (lines and all(any(word in line for word in _FINISHED) for line in lines)):
        return ""
    return _reason(done)


def _allocated(number: str) -> tuple[list[str], list[str]]:
    """A job, or the elements of an array, with nodes: those that run a step of srun, and the others.

    The others have none yet, or are suspended. Raises StokerError if Slurm does not answer.
    """
    of = (f"--jobs={number}", "--format=%i")
    running = _squeue(*of, "--array", "--states=RUNNING,CONFIGURING").split()
    suspended = _squeue(*of, "--array", "--states=SUSPENDED,STOPPED").split()
    steps = [line.split(".", 1) for line in _squeue(*of, "--steps").split()]
    launched = {job for job, step in steps if step.isdecimal()}
    starting = [job for job in running if job not in launched]
    return [job for job in running if job in launched], [*starting, *suspended]


def _squeue(*options: str) -> str:
    """The lines of squeue; none for a job that it has forgotten. Raises StokerError."""
    done = _call(["squeue", "--noheader", *options])
    if done.returncode != 0 and _FORGOTTEN not in done.stderr:
        raise StokerError(f"Slurm does not answer: {_reason(done)}")
    return done.stdout


def _queue(numbers: Sequence[str]) -> dict[str, list[Status]]:
    """Jobs known to squeue, by number: the state of each element. Raises StokerError if it fails."""
    lines = _squeue("--array", "--states=all", f"--jobs={','.join(numbers)}", "--format=%F|%T|%r")
    found: dict[str, list[Status]] = {}
    for line in lines.splitlines():
        number, word, reason = line.split("|", 2)
        found.setdefault(number, []).append(_in_our_words(word, reason))
    return found


def _accounting(numbers: Sequence[str]) -> dict[str, list[Status]]:
    """The same from sacct; empty if the cluster keeps no accounts."""
    done = _call([
        "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(numbers)}",
        "--format=JobID,State",
    ])  # fmt: skip
    found: dict[str, list[Status]] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        number, word = line.split("|", 1)
        found.setdefault(re.split(r"[_+]", number)[0], []).append(_in_our_words(word.split()[0], ""))
    return found


def _in_our_words(word: str, reason: str) -> Status:
    state = _STATES.get(word, "failed")
    if state == "failed":
        return Status(state, word.lower() if word != "FAILED" else "")
    return Status(state, reason if state == "queued" and reason != "None" else "")


def _status(job: Job, found: Sequence[Status]) -> Status:
    """The state of a job from the states of its elements."""
    if job.cancelled:
        lost = ("failed", "unknown")  # one that was queued has written nothing
        found = [Status("cancelled") if status.state in lost else status for status in found]
    first = min(found, key=lambda status: _MOST_TELLING.index(status.state))
    if len(found) == 1:
        return first
    counts = Counter(status.state for status in found)
    return Status(
        first.state, ", ".join(f"{counts[state]} {state}" for state in _MOST_TELLING if counts[state])
    )


def _is_over(job: Job, attempts: str) -> bool:
    """Whether a job has ended, from its record of attempts, by the same rules as its script."""
    lines = attempts.splitlines()
    if not lines:
        return job.cancelled
    if lines[-1].endswith(slurm_script.BEGINS):
        return False
    codes = [int(line.rpartition(" ")[2]) for line in lines if not line.endswith(slurm_script.BEGINS)]
    if codes[-1] in slurm_script.TOLD:
        return job.cancelled
    failed = sum(code not in (0, *slurm_script.TOLD) for code in codes)
    return codes[-1] in (0, EXIT_BAD_INPUT) or failed > job.spec.retries


def _by_attempts(of: Sequence[Job]) -> dict[str, list[Status]]:
    """The states of jobs that Slurm has forgotten, by `Job.id`: from each element's last exit code."""
    return {job.id: _by_codes(elements) for job, elements in zip(of, _written(of), strict=True)}


def _by_codes(elements: Sequence[str]) -> list[Status]:
    """The states of a job's elements, from their records of attempts."""
    forgotten = Status("unknown", "Slurm no longer knows it")
    codes = [attempts.split()[-1] for attempts in elements if attempts.strip()]
    return [_ended(code) if code.isdecimal() else forgotten for code in codes] or [forgotten]


def _written(of: Sequence[Job]) -> list[list[str]]:
    """Like `_attempts`, for each job."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a store is slow to answer
        return list(pool.map(_attempts, of))


def _attempts(job: Job) -> list[str]:
    """The record of attempts of a job, or of each of its elements: here, else in the store of its runs."""
    here = [file.read_text(encoding="utf-8") for file in sorted(job.folder.glob(f"{slurm_script.ATTEMPTS}*"))]
    store = object_store.of(job.runs)
    if here or store is None:
        return here
    with contextlib.suppress(Unreachable):  # this was reported when its jobs were looked up
        stored = tail.of_nodes(job, store).get(job.folder / slurm_script.ATTEMPTS)
        return [stored.read(0).decode()] if stored is not None else []
    return []


def _ended(code: str) -> Status:
    return Status("done") if code == "0" else Status("failed", f"exit code {code}")
