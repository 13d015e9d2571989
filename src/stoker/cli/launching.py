"""How a run is started: here, as ranks of this machine or of several, or as a job of a cluster."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import xxhash
from stoker import config as configs
from stoker import duration, object_store, redaction, store_urls
from stoker.cli import outcome, submit, training
from stoker.cli.options import MaxTime, Nproc
from stoker.cli.output import show_messages
from stoker.cli.submit import Command, Where
from stoker.config import Resolved
from stoker.errors import EXIT_PREEMPTED, BadInput, BadWorldSize
from stoker.launch import local, targets
from stoker.launch.rounds import ONE, Machines, Work
from stoker.object_store import Unreachable
from stoker.recipes import Recipe
from stoker.report import html
from stoker.run import directory, finding, mirror, uploader, view
from stoker.run.state import RunView
from stoker.status import FINISHED
from stoker.words import counted
from stoker.world import World, tasks_of_srun

log = logging.getLogger("stoker")


@dataclass(frozen=True)
class Launch:
    """How the ranks of a run are started; it does not affect what the run computes."""

    nproc: Nproc = None
    nodes: Annotated[
        Machines,
        typer.Option(
            "--nodes", parser=Machines.parsed, metavar="N|LEAST:MOST",
            help="Number of machines; without --on, start the same command on each. "
            "1:4: machines may join and leave.",
        ),
    ] = ONE  # fmt: skip
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="With --nodes: the address of one of the machines, where they meet."
        ),
    ] = None
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts", min=0, metavar="N",
            help="Restart all ranks when one is killed, hangs or raises, at most N times between "
            "checkpoints.",
        ),
    ] = 0  # fmt: skip
    max_time: MaxTime = None
    profile: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Trace these steps with torch's profiler, such as 10:15."),
    ] = None

    @property
    def ranks(self) -> int:
        """Ranks per machine."""
        return self.nproc or 1


ONE_RANK = Launch()


def start(
    recipe: Recipe,
    resolved: Resolved[Any],
    command: Command,
    launch: Launch,
    where: Where,
    *,
    runs: Path,
    name: str | None,
    experiment: str | None,
    json: bool,
    accept_drift: bool = False,
) -> int:
    """Train, from the start or from where the named run stopped; returns the exit code.

    Args:
        command: what was given, which a job runs.
    """
    show_messages()
    redaction.keep_out(resolved.values)
    experiment = experiment or recipe.name
    _check_where(launch, where, name)
    stored = object_store.of(runs.absolute())
    if stored is not None and not where.dry_run:
        store_urls.check(stored.url)  # its driver: before anything is started
    if name is not None and stored is not None and where.dry_run:
        log.info("a dry run does not ask %s whether the run is finished already", stored.url)
    elif name is not None:
        finished = _finished(finding.named(runs.absolute(), experiment, name), resolved)
        if finished is not None:
            uploaded = _upload_rest(finished.directory)
            outcome.show(finished, json, "was already finished", uploaded=uploaded)
            return 0 if uploaded else EXIT_PREEMPTED
    launch = _with_limits(launch, where)
    sizes = _sizes(recipe, resolved.config, launch)
    machines = max(sizes)
    ranks_in_all = max(launch.ranks * machines, World.current().size)
    training.check(recipe, resolved.config, ranks_in_all, None if where.here else where.gpus * machines)
    job = training.RankJob(
        recipe=recipe.reference,
        values=resolved.values,
        sources=resolved.sources,
        runs=runs.absolute(),
        experiment=experiment,
        name=name,
        profile=_steps(launch.profile),
        json=json,
        accept_drift=accept_drift,
        deadline=_deadline(launch.max_time),
    )
    if not where.here:
        return _submit(launch, where, command, runs.absolute(), experiment, name, json)
    if where.dry_run:
        return submit.print_command(where, _limited(launch, command), nproc=launch.ranks, json=json)
    if launch.ranks == 1 and launch.nodes == ONE and launch.max_restarts == 0:
        return training.work(recipe, resolved, job)
    if World.current().size > 1:
        raise BadInput(
            f"a launcher has already started {World.current().size} ranks: leave out --nproc, --nodes and "
            "--max-restarts"
        )
    named = dataclasses.replace(job, name=name or directory.new_id(), elastic=launch.nodes.elastic)
    return local.run(
        training.run_rank, (named,), nproc=launch.ranks, preload=recipe.preload,
        max_restarts=launch.max_restarts, machines=launch.nodes, rendezvous=launch.rendezvous or "",
        shared=runs.absolute(), sizes=sizes, stopped=lambda: _say_stopped(named),
        work=_work(f"{experiment}/{named.name}", recipe, resolved),
    )  # fmt: skip


def _work(run: str, recipe: Recipe, resolved: Resolved[Any]) -> Work:
    """What the launchers of several machines compare."""
    given = [key for key, source in resolved.sources.items() if source != configs.DEFAULT]
    script = xxhash.xxh3_128_hexdigest(recipe.source.read_bytes()) if recipe.source.is_file() else ""
    return run, redaction.tree(resolved.values), given, script


def _say_stopped(job: training.RankJob) -> None:
    """Print the result of an elastic run that was told to stop, if it had begun."""
    found = finding.locate(job.runs, job.experiment, job.name or "")
    if job.elastic and found.exists():
        seen = view.load(found)
        outcome.show(seen, job.json, seen.status)


def _with_limits(launch: Launch, where: Where) -> Launch:
    """The launch with the job options `--time` and `--retries` applied to this machine. Raises BadInput."""
    if not where.here:
        return launch
    if where.retries and launch.max_restarts:
        raise BadInput(
            f"--retries {where.retries} and --max-restarts {launch.max_restarts} mean the same on this "
            "machine; give one of them"
        )
    limits = {"--time": where.time, "--max-time": launch.max_time}
    given = {text: duration.limit(option, text) for option, text in limits.items() if text is not None}
    least = min(given, key=given.__getitem__, default=None)
    return dataclasses.replace(launch, max_restarts=launch.max_restarts or where.retries, max_time=least)


def _limited(launch: Launch, command: Command) -> Command:
    """The command with the limits of its launch."""
    limits = {"--max-time": launch.max_time, "--max-restarts": launch.max_restarts}
    plain = command.without(*limits)
    return plain.with_(*(word for option, limit in limits.items() if limit for word in (option, str(limit))))


def _submit(
    launch: Launch, where: Where, command: Command, runs: Path, experiment: str, name: str | None, json: bool
) -> int:
    """Submit the command as a job; an unnamed run gets a name, so that the job can continue it."""
    run = finding.locate(runs, experiment, name or directory.new_id())
    named = command if name is not None else command.with_("--name", run.id)
    made = submit.training(where, named, name=run.name, nproc=launch.ranks, nodes=launch.nodes.most)
    return submit.send(where, made, runs=runs, trains=[run.name], json=json)


def _fits(recipe: Recipe, config: Any, nproc: int, machines: int) -> bool:
    """Whether this many machines can share the batch and the mesh. Raises BadInput if no number could."""
    batch = getattr(config, "batch_size", None)
    if isinstance(batch, int) and batch % (nproc * machines):
        return False
    try:
        training.check_ranks(recipe, config, nproc * machines)
    except BadWorldSize:
        return False
    return True


def _sizes(recipe: Recipe, config: Any, launch: Launch) -> frozenset[int]:
    """The allowed numbers of machines: within a range, those that can share the work."""
    nodes = launch.nodes
    if nodes.least == nodes.most:
        return frozenset([nodes.most])
    sizes = [n for n in range(nodes.least, nodes.most + 1) if _fits(recipe, config, launch.ranks, n)]
    if not sizes:
        training.check_ranks(recipe, config, launch.ranks * nodes.most)
        raise BadInput(
            f"--nodes {nodes}: none of these numbers of machines, with {counted(launch.ranks, 'rank')} each, "
            f"divides batch_size={config.batch_size} evenly"
        )
    if len(sizes) <= nodes.most - nodes.least:
        log.info("--nodes %s: only %s can share the work evenly", nodes, " or ".join(map(str, sizes)))
    return frozenset(sizes)


def _check_where(launch: Launch, where: Where, name: str | None) -> None:
    """Raises BadInput."""
    if not where.here:
        targets.of(where.on)
        if launch.nodes.least < launch.nodes.most:
            raise BadInput(f"--nodes {launch.nodes}: --on {where.on} needs a fixed number of nodes")
        return
    if launch.nodes == ONE and launch.rendezvous is not None:
        raise BadInput("--rendezvous is for several machines: give their number with --nodes")
    if launch.nodes != ONE and launch.rendezvous is None:
        raise BadInput("--nodes needs --rendezvous HOST:PORT, the address of one of the machines")
    if launch.nodes != ONE and name is None:
        raise BadInput("--nodes needs --name, so that all machines train the same run")
    if launch.nodes == ONE:
        _warn_of_tasks()


def _warn_of_tasks() -> None:
    """Warn if srun has started this command several times: the tasks do not know of each other.

    Each may have a run of its own, and an interactive step has the variables of its tasks too.
    """
    tasks = tasks_of_srun()
    if tasks > 1:
        log.warning(
            "this step of Slurm has %d tasks, and this one trains by itself: for one run, srun --ntasks=1 "
            "and --nproc RANKS, or srun --ntasks-per-node=1 and --nodes N --rendezvous HOST:PORT",
            tasks,
        )  # fmt: skip


def _steps(profile: str | None) -> tuple[int, int] | None:
    """`10:15` as the first and last step. Raises BadInput."""
    if profile is None:
        return None
    first, _, last = profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise BadInput(f"--profile {profile}: give the first and the last step, such as 10:15")
    return int(first), int(last)


def _deadline(max_time: str | None) -> float | None:
    """Raises BadInput."""
    return None if max_time is None else time.monotonic() + duration.limit("--max-time", max_time)


def _finished(found: directory.RunDirectory, resolved: Resolved[Any]) -> RunView | None:
    """The finished run with this name and config, with its report; None if there is none."""
    seen = view.load(found) if found.exists() and not mirror.is_deleted(found) else None
    if seen is None or seen.status != FINISHED:
        return None
    if configs.drift(seen.config, redaction.tree(resolved.values)):
        return None
    if not (found.artifacts / "report.html").exists():  # the run was killed before it wrote its report
        html.write([seen], found.artifacts / "report.html")
    return seen


def _upload_rest(run: directory.RunDirectory) -> bool:
    """Upload what the store lacks of a run that was finished here; returns whether it has all of it."""
    copy = mirror.of(run)
    if copy is None or run.trained_here or not uploader.state(run).behind:
        return True
    try:
        if copy.taken_elsewhere():
            return True
        said = uploader.wait(run, lambda: uploader.ONCE_PATIENCE)
    except Unreachable as error:
        said = uploader.State(error=str(error))
    if said.behind:
        log.warning("%s", uploader.lacking(run, copy, said))
    return not said.behind
