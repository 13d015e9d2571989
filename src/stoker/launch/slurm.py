"""Jobs on Slurm: an sbatch script that resumes automatically, whatever ended it.

The script runs one launcher per node with `srun`, which starts the ranks of that node. Slurm tells it to
stop some time before the time limit (`--signal`, SIGUSR1), and when it takes the nodes back (SIGTERM, a
partition's GraceTime before the end): both signals go to the job's steps, not to the script. The launcher
then saves a checkpoint and ends with 75, and the script makes Slurm requeue the job. It does so only while
Slurm counts the job as running: a job that was cancelled no longer is, nor is one that Slurm requeues by
itself.
"""

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stoker import duration, object_store
from stoker.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, BadInput, StokerError
from stoker.launch import client, job_uploader, jobs, jobspec, slurm_variables, tail
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec, Nodes
from stoker.launch.targets import Line, Status
from stoker.object_store import Unreachable

SCRIPT = "script.sh"
ATTEMPTS = "attempts.txt"
"""In the job's folder: one line for each start, and one for each end, with its exit code."""

log = logging.getLogger("stoker")

_BEGINS = "begins"
_FORGOTTEN = "Invalid job id"  # squeue's error for a job that ended long ago
_FINISHED = ("already finished", "No error")  # what scontrol says of an array's elements if one is over
_WARNING = 120  # seconds before the time limit
_EARLIER = 60  # seconds before that, at which Slurm can give its warning
_TOLD = (EXIT_PREEMPTED, 138, 143)  # exit codes after being told to stop
_QUIET = 120  # seconds without a line after which a cancelled job counts as killed
_PATIENCE = 600  # seconds that a job waits for Slurm to requeue it
_STRAGGLERS = 60  # seconds for the other nodes' launchers to end, once one has
_AT_ONCE = 8  # requests to a store
_FIRST_PORT = 20000  # of ten thousand ports below those that Linux uses for outgoing connections

_NEEDS = (
    "Slurm's commands must be on the PATH; log in to a machine that has them. --dry-run prints the script "
    "anywhere"
)
_FLAGS = {
    "job-name": "--name", "nodes": "--nodes", "ntasks": "--nproc", "ntasks-per-node": "--nproc",
    "cpus-per-task": "--cpus", "mem": "--memory", "time": "--time", "gpus": "--gpus",
    "gpus-per-node": "--gpus", "array": "--controllers",
}  # fmt: skip
"""Slurm settings for which the command has a flag."""
_OWN = ("chdir", "output", "error", "open-mode", "requeue", "no-requeue", "export", "export-file", "wrap")
"""Settings that the script itself needs."""
_ELSEWHERE = "another partition may have more: --option partition=NAME"
_CLUSTERS = "clusters"
"""Another cluster numbers its jobs by itself, and Slurm's other commands do not ask it."""
_ONE_CLUSTER = (
    "a job is followed and cancelled only on the cluster of this machine; submit from a login node of the "
    "other cluster"
)
_SWITCHES = (
    "contiguous", "disable-stdout-job-summary", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice",
    "no-kill", "overcommit", "oversubscribe", "propagate", "quiet", "reboot", "spread-job", "stepmgr",
    "use-min-nodes", "verbose",
)  # fmt: skip
"""Settings that are valid without a value (sbatch(1))."""
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
    if os.environ.get("SBATCH_CLUSTERS"):
        raise BadInput(f"SBATCH_CLUSTERS is set: {_ONE_CLUSTER}; unset it")
    _check_partition(job.spec)
    done = _sbatch(job, "--test-only", given=render(job))
    if done.returncode != 0:
        raise BadInput(f"sbatch refuses the job: {_said(done)}")


def render(job: Job) -> str:
    """The sbatch script. Raises BadInput for invalid settings."""
    spec = job.spec
    jobspec.check(spec)
    stored = object_store.of(job.runs) is not None
    parts = [
        "#!/bin/bash",
        *(_directive(key, value) for key, value in _directives(job).items()),
        "",
        *_environment(job),
        *_meeting(spec),
        *(_uploading(job) if stored else []),
        *_counting(job),
        _STEP_COMMENT.format(warning=_clock(_warning(spec))),
        _step(job),
        "code=$?",
        "",
        *_ending(job, stored=stored),
    ]
    return "\n".join(parts) + "\n"


def code(job: Job) -> str:
    """A description of the code that a job runs."""
    return f"the code in {job.spec.folder} at the time it starts"


def submit(job: Job, rendered: str) -> str:
    """Submit the script; returns the job's number. Raises StokerError."""
    script = jobs.begin(job, SCRIPT, rendered)
    done = _sbatch(job, "--parsable", str(script))
    if done.returncode != 0:
        jobs.forget(job)
        raise StokerError(f"sbatch did not accept the job: {_said(done)}")
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
            return _is_over(known, logs.text(ATTEMPTS)) or (known.cancelled and logs.quiet > _QUIET)
        except StokerError as error:
            if not silent:
                log.warning("%s; still following the logs", error)
            silent = True
            return False

    return tail.lines(logs, logs.until(over) if follow else None)


# -- the script ----------------------------------------------------------------------------

_NUMBER = '"$SLURM_ARRAY_TASK_ID"'
_STEP_COMMENT = """\
# One process per node, which starts all others. Slurm tells it to stop {warning} before the time limit, and
# when it takes the nodes back; it then saves a checkpoint and ends with exit code 75."""
_UPLOADING = """\
# Uploads the output of all nodes to the object store until descriptor 3 is closed. This script ignores
# SIGTERM and outlives the launchers, so that their last lines are uploaded too.
exec 3> >({uploader})
uploader=$!
trap : TERM
"""
_LOST = """\
# After a lost node srun can return 0, and Slurm queues the job again by itself: it has not ended.
now=$(scontrol show job {job})
[[ $code != 0 || -z $now || $now == *JobState=RUNNING* ]] || code={preempted}"""
_MADE = """\
made() {{
    ls {run}/checkpoints
    cat {run}/journal/*.jsonl | grep -c '"type":"metrics"'
}} 2> /dev/null
before=$(made)"""
_LATE = """\
# A start that takes longer than the time limit would be repeated without end: not a third time.
late=
if [[ $code =~ ^({told})$ && $SECONDS -ge {least} && $(made) == "$before" &&
    $now == *JobState=RUNNING*Requeue=1*PreemptTime=None* ]]; then
    late="no step, "
    if grep "exit code" "$attempts" | tail -n 1 | grep -q "$late"; then
        echo "twice in a row no step was made until {warning} before the time limit: raise --time"
        code={over}
    fi
fi"""
_REQUEUE = """\
# Requeue the job, unless it was cancelled, or Slurm requeues it by itself. Slurm may be away for a while.
patience=$((SECONDS + {patience}))
while [ $again = yes ]; do
    now=$(scontrol show job {job})
    [[ -z $now || ($now == *JobState=RUNNING* && $now == *Requeue=1*) ]] || break
    [ -n "$now" ] && scontrol requeue {job} && break
    if [ $SECONDS -ge $patience ]; then
        echo "Slurm has not answered for {shown}: the job is not queued again; submit it again to continue"
        break
    fi
    sleep 2
done"""
_UPLOADED = """\
exec 3>&-
trap '' TERM"""
_WAIT = "wait $uploader  # {patience} seconds at most"
_ALONE = '"$SLURM_JOB_ID"'
_OF_ARRAY = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
"""An element: the last one's SLURM_JOB_ID is the number of the whole array."""


def _directives(job: Job) -> dict[str, str]:
    """The script's settings; `--option` comes last, and can replace `signal`. Raises BadInput."""
    spec = job.spec
    _check_options(spec.options)
    log = "element-%a.log" if spec.elements else "slurm.log"
    found = {"job-name": spec.name, "nodes": str(spec.nodes), "ntasks-per-node": "1"}
    found["cpus-per-task"] = str(spec.cores)
    if spec.gpus:
        found["gpus-per-node"] = str(spec.gpus)
    if spec.memory is not None:
        found["mem"] = jobspec.shown_memory(spec.memory)
    if spec.time is not None:
        found["time"] = _days(spec.time)
    if spec.elements:
        found["array"] = f"0-{spec.elements - 1}"
    found |= {"signal": f"USR1@{_WARNING}", "requeue": "", "open-mode": "append"}
    found |= {"chdir": str(spec.folder), "output": f"{_literal(job.folder)}/{log}"}
    _check_warning(spec)
    return {**found, **spec.options}


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"


def _environment(job: Job) -> list[str]:
    """Variables, as lines of the script."""
    spec = job.spec
    given = {"OMP_NUM_THREADS": str(spec.threads), **spec.environment}
    found = [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
    if spec.passed:
        found.append(f"# from the shell that called sbatch: {', '.join(spec.passed)}")
    if read := slurm_variables.read(_for_sbatch(job)):
        found.append(f"# sbatch also reads: {', '.join(read)}")
    return [*found, ""]


def _meeting(spec: JobSpec) -> list[str]:
    """Where the nodes' launchers meet: this script runs on the first node."""
    if not any(RENDEZVOUS in argument for argument in spec.command):
        return []
    return [
        "# The launchers meet on the first node, where this script runs, at a port specific to this job.",
        f"rendezvous=$(hostname):$(({_FIRST_PORT} + SLURM_JOB_ID % 10000))",
        "",
    ]


def _step(job: Job) -> str:
    """The srun command. Slurm gives a step one core unless the number is repeated."""
    spec = job.spec
    flags = [f"--cpus-per-task={spec.cores}"]
    if spec.nodes > 1:
        flags += [f"--wait={_STRAGGLERS}"]
        flags += ["--open-mode=append", f"--output={_literal(job.folder)}/node-%n.log"]
    return " \\\n    ".join([" ".join(["srun", *map(_word, flags)]), " ".join(map(_word, spec.command))])


def _uploading(job: Job) -> list[str]:
    """Lines that upload the logs while the launchers run. A sweep's array has no upload."""
    words = [job.spec.command[0], "-P", "-m", job_uploader.__name__, str(job.folder)]
    return [_UPLOADING.format(uploader=" ".join(map(_word, words)))]


def _counting(job: Job) -> list[str]:
    """Lines that record the start of an attempt: an attempt without a recorded end is still running."""
    element = f".{_NUMBER}" if job.spec.elements else ""
    return [
        f"attempts={shlex.quote(str(job.folder / ATTEMPTS))}{element}",
        f'echo "$(date +%FT%T) $SLURM_JOB_NODELIST {_BEGINS}" >> "$attempts"',
        *_made(job),
        "",
    ]


def _made(job: Job) -> list[str]:
    """Lines that note at the start of an attempt what its run has, see `_late`."""
    if not _bounded(job):
        return []
    return [_MADE.format(run=shlex.quote(str(job.runs / job.trains[0])))]


def _late(job: Job) -> list[str]:
    """Lines that end a job which reaches its time limit again and again before it can train."""
    if not _bounded(job):
        return []
    told, warning = "|".join(map(str, _TOLD)), _warning(job.spec)
    least = max(0, round(job.spec.time or 0) - warning - _EARLIER)
    return [_LATE.format(told=told, least=least, warning=_clock(warning), over=EXIT_BAD_INPUT)]


def _bounded(job: Job) -> bool:
    """Whether each attempt of a job has a time limit, and should make steps of a run in a shared folder."""
    a_run = len(job.trains) == 1 and "/" in job.trains[0]  # not a sweep
    return a_run and job.spec.time is not None and object_store.of(job.runs) is None


def _ending(job: Job, *, stored: bool) -> list[str]:
    """What happens after the launchers have ended: the job is requeued, or over."""
    spec, told = job.spec, " | ".join(map(str, _TOLD))
    number, late = _OF_ARRAY if spec.elements else _ALONE, _late(job)
    shown = "${late}" if late else ""
    found = [
        _LOST.format(job=number, preempted=EXIT_PREEMPTED),
        *late,
        f'echo "$(date +%FT%T) $SLURM_JOB_NODELIST {shown}exit code $code" >> "$attempts"',
        "case $code in",
        f"    {told}) again=yes ;;  # told to stop; 138 and 143: before Python could handle the signal",
    ]
    if spec.retries:
        failed = f"grep -cvE '({_BEGINS}|exit code (0|{told.replace(' ', '')}))$'"
        found += [
            f"    0 | {EXIT_BAD_INPUT}) again=no ;;",
            f'    *) [ "$({failed} "$attempts")" -le {spec.retries} ] && again=yes || again=no ;;',
        ]
    else:
        found += ["    *) again=no ;;"]
    found += ["esac", *([_UPLOADED] if stored else [])]
    found += [_REQUEUE.format(job=number, patience=_PATIENCE, shown=_clock(_PATIENCE))]
    found += [_WAIT.format(patience=job_uploader.PATIENCE)] if stored else []
    return [*found, "exit $code"]


def _word(argument: str) -> str:
    """An argument as a bash word."""
    pieces = re.split(f"({re.escape(RENDEZVOUS)}|{re.escape(ELEMENT)})", argument)
    known = {RENDEZVOUS: '"$rendezvous"', ELEMENT: _NUMBER}
    return "".join(known.get(piece) or shlex.quote(piece) for piece in pieces if piece) or "''"


def _literal(path: Path) -> str:
    """A path in a setting, where Slurm interprets `%j` and the like."""
    return str(path).replace("%", "%%")


def _days(seconds: float) -> str:
    """Seconds in Slurm's format: 04:00:00, 2-12:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02}:{minutes:02}:{rest:02}"
    return f"{days}-{clock}" if days else clock


def _clock(seconds: int) -> str:
    return f"{seconds // 60} minutes" if seconds % 60 == 0 and seconds > 60 else f"{seconds} seconds"


# -- checks --------------------------------------------------------------------------------


def _check_options(options: Mapping[str, str]) -> None:
    """Raises BadInput."""
    for key, value in options.items():
        if key in _FLAGS:
            raise BadInput(f"--option {key}: use {_FLAGS[key]} instead")
        if key == _CLUSTERS:
            raise BadInput(f"--option {key}: {_ONE_CLUSTER}; omit it")
        if key in _OWN:
            raise BadInput(
                f"--option {key}: the script sets this itself, so that the job can resume; omit it"
            )
        if len(key) == 1:
            raise BadInput(f"--option {key}: use its long name, such as partition for p")
        meant = next((name for name in (*_FLAGS, *_OWN, _CLUSTERS) if name.startswith(key)), "")
        if meant:
            raise BadInput(f"--option {key}: Slurm would read it as {meant}, which cannot be set this way")
        if not value and key not in _SWITCHES:
            raise BadInput(f"--option {key}: no value; give {key}=VALUE, or omit it")


def _warning(spec: JobSpec) -> int:
    """Seconds before the time limit at which Slurm tells the job to stop. Raises BadInput."""
    given = spec.options.get("signal")
    if given is None:
        return _WARNING
    match = re.fullmatch(r"(?:R:)?(?:SIG)?(USR1|TERM|10|15)@(\d+)", given)
    if match is None:
        raise BadInput(
            f"--option signal={given}: give USR1@SECONDS, such as USR1@300 for five minutes before the limit"
        )
    return int(match[2])


def _check_warning(spec: JobSpec) -> None:
    """Raises BadInput if the job would be told to stop as soon as it begins."""
    warning = _warning(spec)
    if spec.time is not None and spec.time <= warning:
        raise BadInput(
            f"--time {duration.shown_clock(spec.time)}: Slurm tells the job to stop {_clock(warning)} before "
            "that; use a longer --time, or --option signal=USR1@SECONDS for a later warning"
        )


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
        raise BadInput(
            f"--time {asked}: a job of {where} may take {allowed}, so it would be queued forever; use --time "
            f"{allowed}, after which it resumes, or another partition: --option partition=NAME"
        )
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


def _call(command: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises BadInput if it or Slurm's configuration is not found, StokerError if
    nothing answers.
    """
    _check_configuration()
    return client.call(command, _NEEDS, given)


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
    return client.call(["sbatch", *arguments], _NEEDS, given, _for_sbatch(job))


def _for_sbatch(job: Job) -> dict[str, str]:
    """The variables that sbatch gets for a job."""
    return slurm_variables.for_sbatch(job.spec, _directives(job), os.environ)


def _do(command: Sequence[str]) -> None:
    """Run a command that must succeed. Raises StokerError."""
    done = _call(command)
    if done.returncode != 0:
        raise StokerError(f"{shlex.join(command)}: {_said(done)}")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The reason why a command failed."""
    words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
    return "; ".join(word for word in words if word) or f"exit code {done.returncode}"


def _refusals(done: subprocess.CompletedProcess[str]) -> str:
    """Why scontrol did not change a job that has not ended; empty if it changed each element that has not."""
    lines = done.stderr.splitlines()
    if done.returncode == 0 or (lines and all(any(word in line for word in _FINISHED) for line in lines)):
        return ""
    return _said(done)


def _allocated(number: str) -> tuple[list[str], list[str]]:
    """A job, or the elements of an array, with nodes: those that run a step of srun, and the others.

    The others have none yet, or are suspended. Raises StokerError if Slurm does not answer.
    """
    of = ("squeue", "--noheader", f"--jobs={number}", "--format=%i")
    running = _listed([*of, "--array", "--states=RUNNING,CONFIGURING"])
    suspended = _listed([*of, "--array", "--states=SUSPENDED,STOPPED"])
    steps = [line.split(".", 1) for line in _listed([*of, "--steps"])]
    launched = {job for job, step in steps if step.isdecimal()}
    starting = [job for job in running if job not in launched]
    return [job for job in running if job in launched], [*starting, *suspended]


def _listed(command: Sequence[str]) -> list[str]:
    """The lines of squeue; none for a job that it has forgotten. Raises StokerError."""
    done = _call(command)
    if done.returncode != 0 and _FORGOTTEN not in done.stderr:
        raise StokerError(f"Slurm does not answer: {_said(done)}")
    return done.stdout.split()


def _queue(numbers: Sequence[str]) -> dict[str, list[Status]]:
    """Jobs known to squeue, by number: the state of each element. Raises StokerError if it fails."""
    done = _call([
        "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(numbers)}", "--format=%F|%T|%r"
    ])  # fmt: skip
    if done.returncode != 0 and _FORGOTTEN not in done.stderr:
        raise StokerError(f"Slurm does not answer: {_said(done)}")
    found: dict[str, list[Status]] = {}
    for line in done.stdout.splitlines():
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
    if lines[-1].endswith(_BEGINS):
        return False
    codes = [int(line.rpartition(" ")[2]) for line in lines if not line.endswith(_BEGINS)]
    if codes[-1] in _TOLD:
        return job.cancelled
    failed = sum(code not in (0, *_TOLD) for code in codes)
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
    here = [file.read_text(encoding="utf-8") for file in sorted(job.folder.glob(f"{ATTEMPTS}*"))]
    store = object_store.of(job.runs)
    if here or store is None:
        return here
    with contextlib.suppress(Unreachable):  # this was reported when its jobs were looked up
        stored = tail.of_nodes(job, store).get(job.folder / ATTEMPTS)
        return [stored.read(0).decode()] if stored is not None else []
    return []


def _ended(code: str) -> Status:
    return Status("done") if code == "0" else Status("failed", f"exit code {code}")
