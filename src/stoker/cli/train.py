"""`stoker train RECIPE`: start a run, or continue the run with the given name."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from stoker import config as configs
from stoker import machine, recipes, redaction
from stoker.cli import submit
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, say_error, show_messages
from stoker.cli.submit import Command, Where, submittable
from stoker.config import Resolved
from stoker.duration import clock
from stoker.engine import options, random_state
from stoker.engine.options import Training
from stoker.errors import EXIT_FAILED, EXIT_PREEMPTED, BadInput, BadWorldSize, Stopped, stops_as_raised
from stoker.launch import alone, jobspec, local, ranks, targets
from stoker.launch.nodes import ONE, Machines
from stoker.object_store import Unreachable
from stoker.recipes import Recipe
from stoker.report import html
from stoker.run import directory, finding, mirror, uploader, view
from stoker.run.view import RunView
from stoker.user_run import Run
from stoker.words import counted
from stoker.world import World

log = logging.getLogger("stoker")

_WEIGHTS = "model.safetensors"
_SINKS_TIMEOUT = 60.0

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config values, dotted: lr=3e-4 lora.rank=8"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A YAML file of config values, or the name of a shipped one."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="The run's id; the same command with the same name continues it.", show_default="new"),
]
Experiment = Annotated[
    str | None,
    typer.Option(help="The experiment, a folder that groups runs.", show_default="the recipe's name"),
]

Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, metavar="N", help="Ranks on this machine.", show_default="1"),
]
Nodes = Annotated[
    Machines,
    typer.Option(
        "--nodes", parser=Machines.parsed, metavar="N|LEAST:MOST",
        help="Number of machines; without --on, start the same command on each. "
        "1:4: machines may join and leave.",
    ),
]  # fmt: skip
Rendezvous = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="With --nodes: the address of one of the machines, where they meet."
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts", min=0, metavar="N",
        help="Restart all ranks when one is killed, hangs or raises, at most N times between checkpoints.",
    ),
]  # fmt: skip
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time", metavar="TIME", help="Save a checkpoint and stop after this time, such as 3h55m."
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(metavar="FIRST:LAST", help="Trace these steps with torch's profiler, such as 10:15."),
]
HERE = Where()


@submittable
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe (llm, image, text), or a file with a train(run, config) function.",
        ),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    experiment: Experiment = None,
    nproc: Nproc = None,
    nodes: Nodes = ONE,
    rendezvous: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    max_time: MaxTime = None,
    profile: Profile = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Start a run, or continue the one with the same --name.

    Values come from defaults, then --config, then KEY=VALUE. `stoker recipes show llm` lists the keys.
    """
    found = recipes.load(recipe)
    resolved = configs.resolve(found.config, overrides or (), recipes.config_file(config))
    launch = Launch(
        nproc or 1, nodes, rendezvous, max_restarts, max_time, profile, where, Command.of_verb("train")
    )
    return start(found, resolved, launch, runs=runs, name=name, experiment=experiment, json=json)


def script_command(train_function: Callable[..., None]) -> Callable[..., int]:
    """The train command for a script's own train function."""

    @submittable
    def command(
        overrides: Overrides = None,
        config: ConfigFile = None,
        name: Name = None,
        experiment: Experiment = None,
        nproc: Nproc = None,
        nodes: Nodes = ONE,
        rendezvous: Rendezvous = None,
        max_restarts: MaxRestarts = 0,
        max_time: MaxTime = None,
        profile: Profile = None,
        runs: RunsFolder = DEFAULT_RUNS,
        json: Json = False,
        where: Where = HERE,
    ) -> int:
        found = recipes.from_function(train_function)
        resolved = configs.resolve(found.config, overrides or (), recipes.config_file(config))
        launch = Launch(
            nproc or 1, nodes, rendezvous, max_restarts, max_time, profile, where,
            Command.of_script(found.source),
        )  # fmt: skip
        return start(found, resolved, launch, runs=runs, name=name, experiment=experiment, json=json)

    command.__doc__ = train_function.__doc__ or "Start a run, or continue the one with the same --name."
    return command


@dataclass(frozen=True)
class Launch:
    """How a run is started; it does not affect what the run computes."""

    nproc: int = 1
    """Ranks per machine."""
    nodes: Machines = ONE
    rendezvous: str | None = None
    max_restarts: int = 0
    max_time: str | None = None
    profile: str | None = None
    where: Where = HERE
    command: Command | None = None
    """The command that starts the run, if it may be submitted to another machine."""


@dataclass(frozen=True)
class Job:
    """What a rank needs to take part in a run."""

    recipe: str
    """The recipe's reference."""
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    runs: Path
    experiment: str
    name: str | None
    profile: tuple[int, int] | None
    json: bool
    accept_drift: bool
    deadline: float | None = None
    """When to stop, by the machine's monotonic clock."""
    elastic: bool = False
    """Whether ranks that stop may be started again on other machines: the launcher says how it ended."""


def start(
    recipe: Recipe,
    resolved: Resolved[Any],
    launch: Launch,
    *,
    runs: Path,
    name: str | None,
    experiment: str | None,
    json: bool,
    accept_drift: bool = False,
) -> int:
    """Train, from the start or from where the named run stopped; returns the exit code."""
    show_messages()
    redaction.keep_out(resolved.values)
    experiment = experiment or recipe.name
    _check_where(launch, name)
    if name is not None:
        finished = _finished(finding.named(runs.absolute(), experiment, name), resolved)
        if finished is not None:
            uploaded = _upload_rest(finished.directory)
            _answer(finished, json, "was already finished", uploaded=uploaded)
            return 0 if uploaded else EXIT_PREEMPTED
    where, launch = launch.where, _with_limits(launch)
    sizes = _sizes(recipe, resolved.config, launch)
    machines = max(sizes)
    ranks_in_all = max(launch.nproc * machines, World.current().size)
    check(recipe, resolved.config, ranks_in_all, None if where.here else where.gpus * machines)
    job = Job(
        recipe.reference, resolved.values, resolved.sources, runs.absolute(), experiment, name,
        _steps(launch.profile), json, accept_drift, _deadline(launch.max_time),
    )  # fmt: skip
    if launch.command is not None and not where.here:
        return _submit(launch, launch.command, runs.absolute(), experiment, name, json)
    if launch.command is not None and where.dry_run:
        return submit.print_command(where, _limited(launch, launch.command), nproc=launch.nproc, json=json)
    if launch.nproc == 1 and launch.nodes == ONE and launch.max_restarts == 0:
        return _work(recipe, resolved, job)
    if World.current().size > 1:
        raise BadInput(
            f"a launcher has already started {World.current().size} ranks: leave out --nproc, --nodes and "
            "--max-restarts"
        )
    named = dataclasses.replace(job, name=name or directory.new_id(), elastic=launch.nodes.elastic)
    return local.run(
        run_rank, (named,), nproc=launch.nproc, preload=recipe.preload, max_restarts=launch.max_restarts,
        machines=launch.nodes, rendezvous=launch.rendezvous or "", shared=runs.absolute(),
        sizes=sizes, stopped=lambda: _say_stopped(named),
    )  # fmt: skip


def _say_stopped(job: Job) -> None:
    """Print the result of an elastic run that was told to stop, if it had begun."""
    found = finding.locate(job.runs, job.experiment, job.name or "")
    if job.elastic and found.exists():
        seen = view.load(found)
        _answer(seen, job.json, seen.status)


def _with_limits(launch: Launch) -> Launch:
    """The launch with the job options `--time` and `--retries` applied to this machine. Raises BadInput."""
    where = launch.where
    if not where.here:
        return launch
    if where.retries and launch.max_restarts:
        raise BadInput(
            f"--retries {where.retries} and --max-restarts {launch.max_restarts} mean the same on this "
            "machine; give one of them"
        )
    most, limit = launch.max_time, where.time
    if limit is not None and (jobspec.time_limit(limit) < (_seconds(most) if most is not None else math.inf)):
        most = limit
    return dataclasses.replace(launch, max_restarts=launch.max_restarts or where.retries, max_time=most)


def _limited(launch: Launch, command: Command) -> Command:
    """The command with the limits of its launch."""
    limits = {"--max-time": launch.max_time, "--max-restarts": launch.max_restarts}
    plain = command.without(*limits)
    return plain.with_(*(word for option, limit in limits.items() if limit for word in (option, str(limit))))


def _submit(
    launch: Launch, command: Command, runs: Path, experiment: str, name: str | None, json: bool
) -> int:
    """Submit the command as a job; an unnamed run gets a name, so that the job can continue it."""
    run = finding.locate(runs, experiment, name or directory.new_id())
    named = command if name is not None else command.with_("--name", run.id)
    trained = run.name
    made = submit.training(launch.where, named, name=trained, nproc=launch.nproc, nodes=launch.nodes.most)
    return submit.send(launch.where, made, runs=runs, trains=[trained], json=json)


def run_rank(job: Job, measure: int | None = None) -> int:
    """Run one rank of a job; for `measure`, see `Run.measure`."""
    show_messages(logging.INFO if measure is None else logging.WARNING)
    recipe = recipes.load(job.recipe)
    return _work(recipe, configs.restore(recipe.config, job.values, job.sources), job, measure)


def _work(recipe: Recipe, resolved: Resolved[Any], job: Job, measure: int | None = None) -> int:
    """Train as one rank, or as the only one; rank 0 prints the result."""
    run = Run(
        job.experiment,
        job.name,
        config=resolved.config,
        runs=job.runs,
        sources=resolved.sources,
        recipe={"name": recipe.name, "reference": recipe.reference},
        seed=int(getattr(resolved.config, "seed", 0)),
        code=recipe.code,
        accept_drift=job.accept_drift,
    )
    attempt = run.attempt
    attempt.profile, attempt.measure, attempt.stop.deadline = job.profile, measure, job.deadline
    if run.world.rank > 0:
        ranks.log_to(run.directory.logs / f"rank-{run.world.rank}.log")
    code, status = work_on(run, recipe, resolved.config)
    if run.world.rank > 0 or measure is not None:
        return code
    if code == 0:  # a run that was told to stop must exit quickly; the follower continues by itself
        _wait_for_sinks(run)
        code = 0 if run.attempt.uploaded else EXIT_PREEMPTED
    if code == 0 or not job.elastic:
        _answer(view.load(run.directory), job.json, status, uploaded=run.attempt.uploaded)
    return code


def check(recipe: Recipe, config: Any, ranks: int, gpus: int | None = None) -> None:
    """Refuse a config that cannot work on this number of ranks, before any is started. Raises BadInput.

    Args:
        gpus: the number of GPUs where the run will train; by default those of this machine.
    """
    check_ranks(recipe, config, ranks, gpus)
    if recipe.check is not None:
        recipe.check(config)


def check_ranks(recipe: Recipe, config: Any, ranks: int, gpus: int | None = None) -> None:
    """The quick part of `check`, which depends on the number of ranks. Raises BadInput."""
    if isinstance(config, Training):
        options.check(
            options.with_deepspeed_file(config), ranks=ranks,
            gpus=_gpus(config, ranks) if gpus is None else gpus,
            batch_size=getattr(config, "batch_size", None),
        )  # fmt: skip
    if recipe.check_ranks is not None:
        recipe.check_ranks(config, ranks)


def _fits(recipe: Recipe, config: Any, nproc: int, machines: int) -> bool:
    """Whether this many machines can share the batch and the mesh. Raises BadInput if no number could."""
    batch = getattr(config, "batch_size", None)
    if isinstance(batch, int) and batch % (nproc * machines):
        return False
    try:
        check_ranks(recipe, config, nproc * machines)
    except BadWorldSize:
        return False
    return True


def _sizes(recipe: Recipe, config: Any, launch: Launch) -> frozenset[int]:
    """The allowed numbers of machines: within a range, those that can share the work."""
    nodes = launch.nodes
    if nodes.least == nodes.most:
        return frozenset([nodes.most])
    sizes = [n for n in range(nodes.least, nodes.most + 1) if _fits(recipe, config, launch.nproc, n)]
    if not sizes:
        check_ranks(recipe, config, launch.nproc * nodes.most)
        raise BadInput(
            f"--nodes {nodes}: none of these numbers of machines, with {counted(launch.nproc, 'rank')} each, "
            f"divides batch_size={config.batch_size} evenly"
        )
    if len(sizes) <= nodes.most - nodes.least:
        log.info("--nodes %s: only %s can share the work evenly", nodes, " or ".join(map(str, sizes)))
    return frozenset(sizes)


def _check_where(launch: Launch, name: str | None) -> None:
    """Raises BadInput."""
    if not launch.where.here:
        targets.of(launch.where.on)
        if launch.nodes.least < launch.nodes.most:
            raise BadInput(f"--nodes {launch.nodes}: --on {launch.where.on} needs a fixed number of nodes")
        return
    if launch.nodes == ONE and launch.rendezvous is not None:
        raise BadInput("--rendezvous is for several machines: give their number with --nodes")
    if launch.nodes != ONE and launch.rendezvous is None:
        raise BadInput("--nodes needs --rendezvous HOST:PORT, the address of one of the machines")
    if launch.nodes != ONE and name is None:
        raise BadInput("--nodes needs --name, so that all machines train the same run")


def _gpus(config: Training, ranks: int) -> int:
    """The number of GPUs of this machine; 0, without importing torch, if no option depends on it."""
    if not (config.backend == "nccl" or config.sync_batchnorm or config.fsdp.offload):
        return 0
    import torch

    return torch.cuda.device_count()


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
    return None if max_time is None else time.monotonic() + _seconds(max_time)


def _seconds(max_time: str) -> float:
    """Raises BadInput."""
    try:
        return clock(max_time)
    except ValueError as error:
        raise BadInput(f"--max-time {error}") from error


def work_on(run: Run, recipe: Recipe, config: Any, *, trial: bool = False) -> tuple[int, str]:
    """Call the recipe within the run; returns the exit code and the status.

    Args:
        trial: the run is a trial of a sweep: it gets no report of its own, and is ended if it hangs.
    """
    if getattr(config, "deterministic", False):
        machine.keep_cublas_workspaces()  # before the recipe uses CUDA
    random_state.seed_everything(run.seed)  # a recipe that imports torch later seeds it itself
    ends = trial or run.world.size > 1 or getattr(config, "hang_limit", None) is not None
    try:
        with run.attempt.stop.handled(), run, alone.watching(run.attempt, _say_hanging, ends=ends):
            arguments = (run, config) if recipe.config.__name__ != "NoConfig" else (run,)
            with stops_as_raised():
                recipe.train(*arguments)
            run.attempt.conclude()
            if run.world.rank == 0:
                _export_weights(run)
            run.end(view.FINISHED)
            if run.world.rank == 0 and not trial:
                _write_report(run)
    except BadInput:
        run.attempt.discard_if_unused()
        raise
    except Stopped as stopped:
        return int(stopped.code or 0), stopped.status
    return 0, view.FINISHED


def _say_hanging(said: str) -> None:
    Console(stderr=True).show_cursor()  # a progress bar that is never closed has hidden it
    say_error(f"{said}; the same command continues from the newest checkpoint", EXIT_FAILED)


def _export_weights(run: Run) -> None:
    """Export the weights of the newest checkpoint, unless the recipe has exported its own."""
    from stoker.checkpoint import manifest

    found, _ = manifest.newest(run.directory.checkpoints)
    if found is None:
        return
    known = view.load(run.directory).artifacts.values()
    others = {event["kind"] for event in known if event["name"] != _WEIGHTS}
    if (run.attempt.made | others) & {"model", "adapter"}:
        return
    from stoker.checkpoint import store

    run.artifact(store.export_model(found, run.directory.artifacts / _WEIGHTS), kind="model")


def _write_report(run: Run) -> None:
    """Write the report of a finished run; a failure to write it does not fail the run."""
    try:
        report = html.write([view.load(run.directory)], run.directory.artifacts / "report.html")
        run.artifact(report, kind="report")
    except (BadInput, OSError) as error:
        log.warning("%s; `stoker report %s` writes it later", error, run.directory.id)


def _finished(found: directory.RunDirectory, resolved: Resolved[Any]) -> RunView | None:
    """The finished run with this name and config, with its report; None if there is none."""
    seen = view.load(found) if found.exists() and not mirror.is_deleted(found) else None
    if seen is None or seen.status != view.FINISHED:
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


def _wait_for_sinks(run: Run) -> None:
    for state in run.attempt.wait_for_sinks(_SINKS_TIMEOUT):
        if state.pending:
            reason = f" ({state.error})" if state.error else ""
            log.warning(
                "%s: %d events are not shipped yet%s; ship them with `stoker sync %s`",
                state.name,
                state.pending,
                reason,
                run.directory.id,
            )


def _answer(seen: RunView, json: bool, status: str, *, uploaded: bool = True) -> None:
    """Print how the run ended, where it is, and what to do next.

    Args:
        uploaded: whether its object store, if it has one, has all of it.
    """
    directory_ = seen.directory
    report = directory_.artifacts / "report.html"
    copy = mirror.of(directory_)
    if json:
        print_json({
            "id": directory_.id, "experiment": directory_.experiment, "run": str(directory_.path),
            "store": copy.where if copy is not None else None, "uploaded": uploaded,
            "status": seen.status, "step": seen.step, "metrics": seen.newest(),
            "artifacts": {n: str(directory_.artifacts / n) for n in seen.artifacts},
            "report": str(report) if report.is_file() else None,
        })  # fmt: skip
        return
    out = console()
    out.print(f"\n{directory_.name} {status} at step {seen.step}")
    said = {metric: f"{value:.6g}" for metric, value in seen.newest().items()}
    said["run"] = _shortest(directory_.path)
    if copy is not None:
        said["in the store" if uploaded else "partly in the store"] = copy.where
    if report.is_file():
        said["report"] = _shortest(report)
    wide = min(48, max(24, *map(len, said)))
    for name, value in said.items():
        out.print(f"  {name:{wide}} {value}")
    at = _option_for(seen.directory)
    if not uploaded:
        out.print(f"next: stoker sync {directory_.id}{at}")
    elif seen.status == view.FINISHED:
        export = f"stoker runs export {directory_.id}{at}"
        out.print(f"next: stoker runs show {directory_.id}{at}   {export}   stoker ui{at}")
    else:
        out.print(f"next: stoker resume {directory_.id}{at}   stoker runs show {directory_.id}{at}")


def _option_for(run: directory.RunDirectory) -> str:
    """The option with which a command finds a run in an object store, unless it looks there by itself."""
    runs = run.path.parent.parent
    url = finding.shown(runs)
    return "" if url == str(runs) or finding.asked_for(None).rstrip("/") == url else f" --runs {url}"


def _shortest(path: Path) -> str:
    relative = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return str(relative)
