"""The sbatch script of a job, and the variables that sbatch gets with it.

The script runs one launcher per node with `srun`, which starts the ranks of that node. Slurm tells it to
stop some time before the time limit (`--signal`, SIGUSR1), and when it takes the nodes back (SIGTERM, a
partition's GraceTime before the end): both signals go to the job's steps, not to the script. The launcher
then saves a checkpoint and ends with 75, and the script makes Slurm requeue the job. It does so only while
Slurm counts the job as running: a job that was cancelled no longer is, nor is one that Slurm requeues by
itself.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from stoker import duration, object_store
from stoker.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, BadInput
from stoker.launch import job_uploader, jobspec, slurm_variables
from stoker.launch.jobs import Job
from stoker.launch.jobspec import ELEMENT, RENDEZVOUS, JobSpec

ATTEMPTS = "attempts.txt"
"""In the job's folder: one line for each start, and one for each end, with its exit code."""
BEGINS = "begins"
"""Ends the line of a start."""
_WARNING = 120  # seconds before the time limit
_EARLIER = 60  # seconds before that, at which Slurm can give its warning
TOLD = (EXIT_PREEMPTED, 138, 143)
"""Exit codes after being told to stop."""
_PATIENCE = 600  # seconds that a job waits for Slurm to requeue it
_REFUSALS = 5  # answers that it cannot be
_STRAGGLERS = 60  # seconds for the other nodes' launchers to end, once one has
_FIRST_PORT = 20000  # of ten thousand ports below those that Linux uses for outgoing connections

_FLAGS = {
    "job-name": "--name", "nodes": "--nodes", "ntasks": "--nproc", "ntasks-per-node": "--nproc",
    "cpus-per-task": "--cpus", "mem": "--memory", "time": "--time", "gpus": "--gpus",
    "gpus-per-node": "--gpus", "array": "--controllers",
}  # fmt: skip
"""Slurm settings for which the command has a flag."""
_OWN = ("chdir", "output", "error", "open-mode", "requeue", "no-requeue", "export", "export-file", "wrap")
"""Settings that the script itself needs."""
_CLUSTERS = "clusters"
"""Another cluster numbers its jobs by itself, and Slurm's other commands do not ask it."""
ONE_CLUSTER = (
    "a job is followed and cancelled only on the cluster of this machine; submit from a login node of the "
    "other cluster"
)
_SWITCHES = (
    "contiguous", "disable-stdout-job-summary", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice",
    "no-kill", "overcommit", "oversubscribe", "propagate", "quiet", "reboot", "spread-job", "stepmgr",
    "use-min-nodes", "verbose",
)  # fmt: skip
"""Settings that are valid without a value (sbatch(1))."""
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
now=
[ $code = 0 ] && now=$(scontrol show job {job})
[[ -z $now || $now == *JobState=RUNNING* ]] || code={preempted}"""
_MADE = """\
made() {{
    ls {run}/checkpoints
    grep -h '"type":"metrics"' {run}/journal/*.jsonl | grep -cv '"step":0,'
}} 2> /dev/null
before=$(made)"""
_LATE = """\
# A start that takes longer than the time limit would be repeated without end: not a third time.
late=
if [[ $code =~ ^({told})$ && $SECONDS -ge {least} && $(made) == "$before" &&
    $(scontrol show job {job}) == *JobState=RUNNING*Requeue=1*PreemptTime=None* ]]; then
    late="no step, "
    if [[ $(tail -n 2 "$attempts" | head -n 1) == *"$late"* ]]; then  # the last line is this attempt's start
        echo "twice in a row no step was made until {warning} before the time limit: raise --time"
        code={over}
    fi
fi"""
_REQUEUE = """\
# Requeue the job, unless it was cancelled, or Slurm requeues it by itself. Slurm may be away for a while.
patience=$((SECONDS + {patience})) refused=0
while [ $again = yes ]; do
    now=$(scontrol show job {job})
    [[ -z $now || ($now == *JobState=RUNNING* && $now == *Requeue=1*) ]] || break
    [ -n "$now" ] && scontrol requeue {job} && break
    [ -n "$now" ] && refused=$((refused + 1))
    if [ $SECONDS -ge $patience ] || [ $refused -ge {refusals} ]; then
        echo "Slurm does not queue the job again, see above: submit it again to continue"
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


def render(job: Job) -> str:
    """The sbatch script. Raises BadInput for invalid settings."""
    spec = job.spec
    jobspec.check(spec)
    stored = object_store.of(job.runs) is not None
    settings = _directives(job)
    parts = [
        "#!/bin/bash",
        *(_directive(key, value) for key, value in settings.items()),
        "",
        *_environment(spec, settings),
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


def variables(job: Job) -> dict[str, str]:
    """The variables that sbatch gets for a job."""
    return slurm_variables.for_sbatch(job.spec, _directives(job), os.environ)


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


def _environment(spec: JobSpec, settings: Mapping[str, str]) -> list[str]:
    """Variables, as lines of the script."""
    given = {"OMP_NUM_THREADS": str(spec.threads), **spec.environment}
    found = [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
    if spec.passed:
        found.append(f"# from the shell that called sbatch: {', '.join(spec.passed)}")
    if read := slurm_variables.read(slurm_variables.for_sbatch(spec, settings, os.environ)):
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
        f'echo "$(date +%FT%T) $SLURM_JOB_NODELIST {BEGINS}" >> "$attempts"',
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
    told, warning = "|".join(map(str, TOLD)), _warning(job.spec)
    least = max(0, round(job.spec.time or 0) - warning - _EARLIER)
    number = _OF_ARRAY if job.spec.elements else _ALONE
    return [_LATE.format(job=number, told=told, least=least, warning=_clock(warning), over=EXIT_BAD_INPUT)]


def _bounded(job: Job) -> bool:
    """Whether each attempt of a job has a time limit, and should make steps of a run in a shared folder."""
    a_run = len(job.trains) == 1 and "/" in job.trains[0]  # not a sweep
    return a_run and job.spec.time is not None and object_store.of(job.runs) is None


def _ending(job: Job, *, stored: bool) -> list[str]:
    """What happens after the launchers have ended: the job is requeued, or over."""
    spec, told = job.spec, " | ".join(map(str, TOLD))
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
        failed = f"grep -cvE '({BEGINS}|exit code (0|{told.replace(' ', '')}))$'"
        found += [
            f"    0 | {EXIT_BAD_INPUT}) again=no ;;",
            f'    *) [ "$({failed} "$attempts")" -le {spec.retries} ] && again=yes || again=no ;;',
        ]
    else:
        found += ["    *) again=no ;;"]
    found += ["esac", *([_UPLOADED] if stored else [])]
    found += [_REQUEUE.format(job=number, patience=_PATIENCE, refusals=_REFUSALS)]
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


def _check_options(options: Mapping[str, str]) -> None:
    """Raises BadInput."""
    for key, value in options.items():
        if key in _FLAGS:
            raise BadInput(f"--option {key}: use {_FLAGS[key]} instead")
        if key == _CLUSTERS:
            raise BadInput(f"--option {key}: {ONE_CLUSTER}; omit it")
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
