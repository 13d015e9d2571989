"""`stoker jobs list|show|logs|cancel`: jobs submitted to clusters with `--on`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from stoker import duration
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, show_messages
from stoker.errors import BadInput, StokerError
from stoker.launch import jobs, jobspec, targets
from stoker.launch.jobs import Job
from stoker.launch.targets import Status
from stoker.object_store import Unreachable
from stoker.report.terminal import print_whole, table
from stoker.run import finding, mirror, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView
from stoker.words import counted

log = logging.getLogger("stoker")

JobName = Annotated[
    str,
    typer.Argument(metavar="JOB", help="A job's id, the start of its id, the cluster's id, or a run's name."),
]
_STYLES = {"running": "blue", "done": "green", "failed": "red", "unknown": "red"}

app = typer.Typer(help="Jobs submitted to clusters with --on.", no_args_is_help=True)


@app.command("list")
def list_(runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """List the jobs of a runs folder, newest last."""
    show_messages()
    known = jobs.every(runs)
    _bring_runs(runs)
    states = _states(known)
    if json:
        print_json({"jobs": [_entry(job, states[job.id]) for job in known]})
    elif known:
        _print(known, states)
    else:
        console().print(
            f"no jobs under {finding.shown(runs)} yet; submit one: stoker train ... --on slurm", markup=False
        )


@app.command()
def show(job: JobName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Show a job: its state, resources and what was submitted. The code at that time is listed."""
    show_messages()
    found = jobs.find(runs, job)
    _bring_runs(runs)
    status = _states([found])[found.id]
    if json:
        print_json({**_entry(found, status), "spec": found.spec.to_json(), "code": found.code})
        return
    out = console()
    for name, value in _facts(found, status):
        out.print(f"  {name:12} {value}", markup=False)
    for line in _changed_code(found):
        out.print(line, markup=False)
    at = finding.option(runs)
    more = "" if status.over else f"   stoker jobs cancel {found.id}{at}"
    out.print(f"next: stoker jobs logs {found.id}{at}{more}", markup=False)


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank's output.")] = None,
    runs: RunsFolder = DEFAULT_RUNS,
) -> None:
    """Print the output of a job's nodes and ranks. Each line has its source."""
    show_messages()
    found = jobs.find(runs, job)
    wanted = None if rank is None else f"rank {rank}"
    written = False
    for line in targets.of(found.target).lines(found, follow=follow):
        if wanted is None or line.source == wanted:
            sys.stdout.write(f"[{line.source}] {line.text}\n")
            sys.stdout.flush()
            written = True
    if not written:
        status = _states([found])[found.id]
        where = "" if wanted is None else f" under {finding.shown(found.runs)}"
        log.info("%s has written nothing%s yet; the job is %s", wanted or found.id, where, _described(status))


@app.command()
def cancel(
    job: JobName,
    now: Annotated[
        bool, typer.Option("--now", help="End it without another checkpoint; existing ones are kept.")
    ] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """End a job after a checkpoint, without requeueing it. `stoker resume` continues its run."""
    found = jobs.find(runs, job)
    target = targets.of(found.target)
    status = target.states([found])[found.id]
    if status.over:
        raise BadInput(f"job {found.id} is over: {_described(status)}")
    target.cancel(found, at_once=now)
    jobs.write(dataclasses.replace(found, cancelled=True))
    if json:
        print_json({"job": found.id, "was": status.state})
        return
    at_once = now or status.state in ("queued", "suspended")  # what is stopped cannot save anything
    how = "ends at once" if at_once else "ends with a checkpoint"
    console().print(f"job {found.id} was {status.state}; it {how}, and is not queued again", markup=False)


def _bring_runs(runs: Path) -> None:
    """If the runs are in an object store, fetch their progress."""
    try:
        mirror.refresh(runs.absolute())
    except Unreachable as error:
        log.warning("the progress of runs on other machines is unknown: %s", error)


def _states(known: Sequence[Job]) -> dict[str, Status]:
    """The states of jobs; if a target does not answer, what the jobs themselves recorded is used."""
    found: dict[str, Status] = {}
    by_target: dict[str, list[Job]] = defaultdict(list)
    for job in known:
        by_target[job.target].append(job)
    for name, of_target in by_target.items():
        try:
            found |= targets.of(name).states(of_target)
        except StokerError as error:
            log.warning("%s", error)
            found |= {job.id: Status("unknown", f"{name} does not answer") for job in of_target}
            found |= targets.of(name).ended(of_target)
    return found


def _entry(job: Job, status: Status) -> dict[str, Any]:
    return {
        "id": job.id, "target": job.target, "native": job.native, "state": status.state,
        "reason": status.reason or None, "runs": list(job.trains), "nodes": job.spec.nodes,
        "processes": job.spec.processes, "gpus": job.spec.gpus, "folder": str(job.folder),
        "submitted": _when(job), "by": job.by, "step": _step(job),
    }  # fmt: skip


def _print(known: Sequence[Job], states: dict[str, Status]) -> None:
    headings = ("job", "on", "id", "state", "run", "step", "nodes", "submitted")
    made = table(headings, right=("step", "nodes"))
    for job in known:
        status, step = states[job.id], _step(job)
        made.add_row(
            job.id, job.target, job.native, Text(_described(status), _STYLES.get(status.state, "yellow")),
            ", ".join(job.trains), "" if step is None else f"{step:,}", str(job.spec.nodes), _when(job),
        )  # fmt: skip
    print_whole(console(), made)


def _facts(job: Job, status: Status) -> list[tuple[str, str]]:
    spec = job.spec
    needs = [counted(spec.nodes, "node"), f"{counted(spec.processes, 'rank')} per node"]
    needs += [counted(spec.gpus, "GPU")] if spec.gpus else []
    needs += [counted(spec.cores, "core")]
    needs += [jobspec.shown_memory(spec.memory)] if spec.memory is not None else []
    given = {
        "time limit": duration.shown_clock(spec.time) if spec.time is not None else "",
        "retries": str(spec.retries or ""),
        "options": ", ".join(f"{key}={value}" if value else key for key, value in spec.options.items()),
        "variables": ", ".join([*spec.environment, *spec.passed]),  # whose values may be private
    }
    return [
        ("job", f"{job.id}, {job.target}'s {job.native}"),
        ("state", _described(status)),
        ("runs", ", ".join(job.trains)),
        ("needs", ", ".join(needs)),
        *((name, value) for name, value in given.items() if value),
        ("submitted", f"{_when(job)} by {job.by} in {spec.folder}"),
        ("code", _code(job.code) or "not in git"),
        ("files", str(job.folder)),
    ]


def _changed_code(job: Job) -> list[str]:
    """A note if a run started from different code than was there when its job was submitted."""
    for seen in filter(None, map(_view, (job.runs / run for run in job.trains))):
        began, code = seen.attempts[0].started if seen.attempts else 0.0, seen.record.get("code") or {}
        if job.code and code and began > job.submitted and _code(code) != _code(job.code):
            return [f"the code changed while the job was queued: its run started from {_code(code)}"]
    return []


def _code(code: Any) -> str:
    if not code.get("commit"):
        return ""
    return f"{code['commit'][:10]}{' with uncommitted changes' if code['dirty'] else ''}"


def _described(status: Status) -> str:
    return f"{status.state} ({status.reason})" if status.reason else status.state


def _when(job: Job) -> str:
    return datetime.fromtimestamp(job.submitted).astimezone().isoformat(" ", "seconds")[:19]


def _step(job: Job) -> int | None:
    """The step that the run has reached, if the job trains exactly one."""
    seen = _view(job.runs / job.trains[0]) if len(job.trains) == 1 else None
    return seen.step if seen is not None else None


def _view(run: Any) -> RunView | None:
    try:
        return view.load(RunDirectory(run)) if RunDirectory(run).exists() else None
    except BadInput:
        return None
