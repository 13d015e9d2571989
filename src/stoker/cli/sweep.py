"""`stoker sweep RECIPE`: search for the best values of a recipe's keys; a trial is a run."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from stoker import config as configs
from stoker import object_store, recipes
from stoker.attempt import Run
from stoker.cli import submit, train
from stoker.cli import trials as trials_seen
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, show_messages
from stoker.cli.submit import Command, Where
from stoker.cli.train import HERE, MaxTime, Nproc
from stoker.duration import Duration, clock
from stoker.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, BadInput, StokerError
from stoker.launch import jobspec, ranks, targets
from stoker.launch.targets import LOCAL, TARGETS
from stoker.machine import visible_gpus
from stoker.recipes import Recipe
from stoker.run import finding
from stoker.run.directory import RunDirectory
from stoker.run.series import guess_goal
from stoker.stopping import STATUS
from stoker.tracking import follower
from stoker.world import World

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from stoker.tune.plan import Goal, Objective, Plan
    from stoker.tune.record import Record
    from stoker.tune.schedulers import Scheduler
    from stoker.tune.search import Executor, Search
    from stoker.tune.space import Space
    from stoker.tune.study import Kept
    from stoker.tune.trial import Job, Link

log = logging.getLogger("stoker")

_FREE_TIMEOUT = 120.0  # of a machine that is lost, a server of files forgets its locks after 90 s, by default
_SINKS_TIMEOUT = 60.0
_RAY = "ray"
_On = Annotated[
    str,
    typer.Option(
        metavar="|".join(dict.fromkeys((LOCAL, _RAY, *TARGETS))),
        help="Where trials run: here, on a Ray cluster, or where the search itself is a job.",
    ),
]


@functools.partial(submit.submittable, on=_On)
def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe (llm, image, text), or a file with a train(run, config) function.",
        ),
    ],
    space: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=SPACE]...",
            help="lr='log(1e-5, 1e-3)' batch_size='[16, 32]' lora.rank='int(4, 64, log)' "
            "dropout='uniform(0, 0.5)'; KEY=VALUE is the same in all trials.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A YAML file of the same.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="The folder of its trials; the same command with the same name goes on.",
            show_default="RECIPE-sweep",
        ),
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Begin another search beside one of this name, as NAME-2.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="What is to become best; several may be given, and by the first one trials end early.",
            show_default="val_loss",
        ),
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(metavar="min|max", help="Which way, of each.", show_default="by the metric's name"),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trials at a time.",
            show_default="1, or as many as the GPUs of the machine are for; on Ray, what there is room for",
        ),
    ] = None,
    nproc: Nproc = None,
    controllers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="As a job: an array of so many, each a controller of the study in --storage.",
        ),
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --on ray: the cluster, of which this machine is one.",
            show_default="RAY_ADDRESS, else Ray is started here",
        ),
    ] = None,
    per_gpu: Annotated[int, typer.Option(min=1, help="Ranks of trials that share a GPU.")] = 1,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse-processes",
            help="A process trains one trial after another, for trials of a second or less: "
            "what one leaves in memory the next one finds.",
        ),
    ] = False,
    sampler: Annotated[
        str | None,
        typer.Option(help="random, grid, qmc, tpe, gp, cmaes, nsga2 or nsga3.", show_default="tpe"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="none, median, asha, asha-stop, hyperband or pbt: which trials end early.",
            show_default="none",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="staged",
            help="Instead of these two, for trainings that take long: half of the trials at random, the "
            "others by tpe where the best are, all ended early as by asha; then the best few to their end.",
        ),
    ] = None,
    least: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="asha, hyperband: the first rung, as 100 (steps), 1ep or 1000000tok; "
            "pbt: from one comparison to the next.",
        ),
    ] = None,
    most: Annotated[
        str | None, typer.Option(metavar="DURATION", help="The length of a whole trial, for those.")
    ] = None,
    factor: Annotated[
        int, typer.Option(min=2, help="asha, hyperband: one in so many goes on to the next rung.")
    ] = 3,
    first: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="KEY=VALUE,...", help="Values that are tried first; may be repeated."),
    ] = None,
    warm_start: Annotated[
        str, typer.Option("--warm-start", metavar="SWEEP", help="Let the sampler learn from another one.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler.")] = 0,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="End after more failed trials than that.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="End once all trials have spent so much: 40gpuh (of all ranks), 300ep, 20000.",
        ),
    ] = None,
    max_time: MaxTime = None,
    storage: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="STOKER_STORAGE",
            help="Keep the study in a database, as postgresql+psycopg2://HOST/NAME, for several controllers "
            "to share.",
            show_default="a file beside the trials",
        ),
    ] = "",
    study: Annotated[
        str | None,
        typer.Option(
            help="The study's name there: sweeps of one study search together.", show_default="NAME"
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Search for the best values of a recipe's keys; the same command goes on with it.

    Every trial is a run in the folder of the sweep, tracked, resumed and reported as any other.
    """
    show_messages()
    from stoker.tune import plan as plans
    from stoker.tune import record, schedulers
    from stoker.tune import study as studies

    _check_where(where, controllers, storage)
    if object_store.of(runs.absolute()) is not None:
        raise BadInput("--runs: a search stands on a disk, not in an object store; give a local folder")
    found = recipes.load(recipe)
    searched, tries = _space(found, space or (), config, first or ())
    objectives = _objectives(metric or [], goal or [])
    sampler, scheduler = _ways(strategy, sampler, scheduler, several=len(objectives) > 1)
    _check_ways(sampler, scheduler, lengths=bool(least or most), tries=bool(tries), warm=bool(warm_start))
    shortest, whole, unit = plans.span(least, most)
    rule = schedulers.make(scheduler, least=shortest, most=whole, factor=factor, population=trials)
    if unit == plans.SHARE:
        _check_shares(searched, rule)
    name = finding.checked(name or f"{found.name}-sweep")
    folder = runs.absolute() / (record.free_name(runs, name) if new else name)
    wanted = record.Record(
        found.reference, searched.described(), ", ".join(one.metric for one in objectives),
        ", ".join(one.goal for one in objectives), sampler, _said(scheduler, rule, unit), seed, nproc or 1,
        tries, warm_start, *((record.shown(storage), study or folder.name) if storage else ("", "")),
    )  # fmt: skip
    record.check(folder, wanted)
    if storage and scheduler == "pbt":
        raise BadInput("--storage: pbt goes on from checkpoints of one folder; leave out --storage")
    if warm_start and not record.is_sweep(folder):
        record.check_earlier(runs / warm_start, wanted)
    if sampler == "grid":
        trials = min(trials, len(searched.combinations()))
    if len(tries) > trials:
        raise BadInput(f"{len(tries)} --try for {trials} trials: give as many --trials, or fewer")
    spends = plans.Budget.parse(budget) if budget is not None else None
    counted = plans.unit_of(unit, spends, counts=bool(least or most))
    drawn_by = studies.sampler(sampler, searched, seed, trials)
    deadline = _deadline(max_time, where)
    if where.on not in (LOCAL, _RAY):
        ranks_at_once = (nproc or 1) * (parallel or 1) // per_gpu or 1
        return _submit(where, folder, wanted, controllers, ranks_at_once, json)
    if where.dry_run:
        return submit.print_command(where, Command.of_verb("sweep"), nproc=nproc or 1, json=json)
    places = _Places(where.on, address, parallel, nproc or 1, per_gpu, reuse)
    with _executor(found, places) as workers:
        lock = record.take(folder)
        try:
            plan = plans.Plan(
                folder, found.reference, found.config, objectives, trials,
                record.provenance_of(folder, found.code), seed, nproc or 1, counted, whole,
                max_failures, spends, deadline,
            )  # fmt: skip
            search = _search(plan, searched, _kept(folder, storage), drawn_by, wanted, rule, workers, runs)
            shipping = follower.spawn_for_sweep(folder) if follower.enabled() else None
            code, error = _run(search)
        finally:
            os.close(lock)
    _wait_for_sinks(shipping, code)
    trials_seen.answer(search, json=json, error=error)
    return code


def _check_where(where: Where, controllers: int, storage: str) -> None:
    """Raises BadInput."""
    if where.on == _RAY:
        for name in ("gpus", "cpus", "memory", "time", "retries", "env", "option", "dry_run"):
            if getattr(where, name) != getattr(HERE, name):
                option = f"--{name.replace('_', '-')}"
                raise BadInput(f"{option} is for jobs, and --on ray has trials on a cluster; leave it out")
    elif not where.here:
        targets.of(where.on)
    if where.here and where.retries:
        raise BadInput("--retries: a trial that fails is a failed trial; leave it out, see --max-failures")
    if controllers > 1 and where.on in (LOCAL, _RAY):
        raise BadInput(f"--controllers {controllers}: it is for jobs; give --on {' or '.join(TARGETS)} too")
    if controllers > 1 and not storage:
        raise BadInput(
            f"--controllers {controllers}: several controllers share a study that is in a database; give "
            "--storage postgresql+psycopg2://HOST/NAME, or set STOKER_STORAGE"
        )


def _deadline(max_time: str | None, where: Where) -> float | None:
    """When the search is to stop here, by the machine's monotonic clock. Raises BadInput."""
    limits = [clock(max_time)] if max_time is not None else []
    limits += [jobspec.time_limit(where.time)] if where.here and where.time is not None else []
    return time.monotonic() + min(limits) if limits else None


def _submit(where: Where, folder: Path, wanted: Record, controllers: int, ranks: int, json: bool) -> int:
    """Have a cluster search: one job, or an array of jobs whose elements share a study. Raises BadInput.

    Args:
        folder: of the sweep; those of an array are called by its name and their number.
        ranks: that train at a time in each.
    """
    from stoker.tune import record

    command = Command.of_verb("sweep")
    if command.has("--storage") and wanted.storage != command.value("--storage"):
        raise BadInput(
            "--storage: its password would be written into a file; set STOKER_STORAGE here instead, or have "
            "it in ~/.pgpass"
        )
    name, elements = folder.name, controllers if controllers > 1 else 0
    names = [f"{name}-{number}" for number in range(elements)] or [name]
    for one in names:
        record.check(folder.with_name(one), wanted)
    plain = command.without("--name", "--study", "--controllers", flags=["--new"])
    plain = plain.with_("--name", submit.element(name) if elements else name)
    if wanted.study:
        plain = plain.with_("--study", wanted.study)
    made = submit.spec(where, plain, name=name, processes=ranks, elements=elements)
    if wanted.storage and not command.has("--storage"):
        made = dataclasses.replace(made, passed=(*made.passed, "STOKER_STORAGE"))
    return submit.send(where, made, runs=folder.parent, trains=names, json=json)


def _space(
    recipe: Recipe, given: Sequence[str], config: Path | None, first: Sequence[str]
) -> tuple[Space, tuple[Mapping[str, Any], ...]]:
    """What is searched, and the values that are tried first. Raises BadInput."""
    from stoker.tune.space import parse, parse_tries

    searched = parse(given, recipe.config, recipes.config_file(config))
    if not searched.parameters:
        raise BadInput("nothing is searched: give a key a range or choices, such as lr='log(1e-5, 1e-3)'")
    return searched, tuple(searched.params(parse_tries(text)) for text in first)


def _check_shares(searched: Space, rule: Scheduler) -> None:
    """Refuse shares of the data where nothing is trained by such. Raises BadInput."""
    if not rule.lengths(0):
        raise BadInput("a share of the data is for asha, asha-stop, hyperband and --strategy staged")
    if "data_share" not in configs.describe(searched.config):
        raise BadInput(
            "a share of the data: the recipe has no key data_share; let its config inherit stoker.Training, "
            "and give that to its Trainer"
        )
    if "data_share" in searched.described():
        raise BadInput("data_share is given twice, as a key and by --least and --most: leave out the key")


def _objectives(metrics: Sequence[str], goals: Sequence[str]) -> tuple[Objective, ...]:
    """What is to become best. Raises BadInput."""
    from stoker.tune.plan import Objective

    metrics = metrics or ["val_loss"]
    ways: Sequence[str | None] = goals or [None] * len(metrics)
    if len(set(metrics)) < len(metrics):
        raise BadInput(f"--metric {' --metric '.join(metrics)}: each once")
    if len(goals) not in (0, len(metrics)):
        raise BadInput(
            f"{len(goals)} --goal for {len(metrics)} --metric: give one for each, in the same order"
        )
    return tuple(Objective(metric, _goal(metric, way)) for metric, way in zip(metrics, ways, strict=True))


def _ways(
    strategy: str | None, sampler: str | None, scheduler: str | None, *, several: bool
) -> tuple[str, str]:
    """The names of the sampler and of the scheduler. Raises BadInput."""
    from stoker.tune import study as studies

    if strategy is not None:
        if strategy != studies.STAGED:
            raise BadInput(f"--strategy {strategy}: there is {studies.STAGED}")
        if sampler or scheduler:
            raise BadInput(
                "--strategy staged has a sampler and a scheduler: leave out --sampler, --scheduler"
            )
        return studies.STAGED, studies.STAGED
    sampler = sampler or "tpe"
    if several and sampler in studies.SAMPLERS and sampler not in studies.SEVERAL:
        raise BadInput(
            f"--sampler {sampler} searches for one metric; for several give {', '.join(studies.SEVERAL)}"
        )
    return sampler, scheduler or "none"


def _check_ways(sampler: str, scheduler: str, *, lengths: bool, tries: bool, warm: bool) -> None:
    """Refuse options that a sampler or a scheduler has no use for. Raises BadInput."""
    from stoker.tune import study as studies

    if scheduler == "none" and lengths:
        raise BadInput(
            "--least and --most are for a --scheduler that ends trials early: name one, or leave out"
        )
    if tries and sampler == "grid":
        raise BadInput("--try: a grid has every value; leave it out")
    if warm and sampler == studies.STAGED:
        raise BadInput("--warm-start: --strategy staged begins at random; leave out one of the two")


def _kept(folder: Path, url: str) -> Kept:
    from stoker.tune import record
    from stoker.tune import study as studies

    return studies.Database(url) if url else studies.JournalFile(folder / record.STUDY)


def _search(
    plan: Plan,
    searched: Space,
    kept: Kept,
    drawn_by: BaseSampler,
    wanted: Record,
    rule: Scheduler,
    workers: Executor,
    runs: Path,
) -> Search:
    """The search with its study: a new one, or what there is of it. Raises BadInput."""
    from stoker.tune import record
    from stoker.tune import study as studies
    from stoker.tune.peers import Peers
    from stoker.tune.search import Search

    goals = [one.goal for one in plan.objectives]
    study = studies.opened(kept, drawn_by, goals, wanted.study or studies.NAME)
    if wanted.study:
        record.check_study(study, wanted)
    if not study.get_trials(deepcopy=False):
        with kept.together():
            _begin(study, wanted.tries, runs / wanted.warm_start if wanted.warm_start else None)
    record.begin(plan.folder, wanted)
    if plan.whole is not None and study.user_attrs.get("whole") != plan.whole:
        study.set_user_attr("whole", plan.whole)  # of a trial that nothing ends early
    if "rungs" not in study.user_attrs:
        study.set_user_attr("rungs", [*rule.lengths(0)][:-1])
    peers = Peers(study, record.uid(plan.folder), plan.first) if wanted.study else None
    return Search(plan, searched, study, kept, rule, workers, peers)


def work(job: Job, link: Link) -> dict[str, Any]:
    """What each process of a trial does: train its run; returns how that ended."""
    from stoker.tune.plan import SHARE
    from stoker.tune.trial import Reporter

    logging.getLogger("stoker").setLevel(logging.DEBUG)
    recipe = _loaded(job.recipe)
    resolved: Any = configs.restore(recipe.config, job.values, job.sources)
    train.check(recipe, resolved.config, World.current().size)
    if World.current().rank == 0:
        _wait_until_free(finding.locate(job.runs, job.sweep, job.run))
    run = Run(
        job.sweep, job.run, config=resolved.config, runs=job.runs, sources=resolved.sources,
        recipe={"name": recipe.name, "reference": recipe.reference},
        seed=int(getattr(resolved.config, "seed", 0)), code=recipe.code,
        provenance=job.provenance,
    )  # fmt: skip
    if job.provenance is not None:
        run.leave_shipping()
    if job.tags:
        run.tag(**job.tags)
    ranks.log_to(run.directory.logs / f"rank-{run.world.rank}.log")
    reporter = Reporter(run, job.metrics, job.unit, link, waits=job.waits)
    run.listen(reporter)
    _, status = train.work_on(run, recipe, resolved.config, trial=True)
    if job.unit == SHARE and run.plan.get("data_share") != resolved.config.data_share:
        raise BadInput("its Trainer is not told the share of the data: give it training=config")
    return {"status": status, "logged": sorted(reporter.logged), "values": reporter.values}


@functools.cache
def _loaded(reference: str) -> Recipe:
    """A recipe, once in each process, which may train several trials of it."""
    return recipes.load(reference)


def _begin(study: Any, tries: Sequence[Mapping[str, Any]], earlier: Path | None) -> None:
    """Let a new study know what it learns from, and what is to be tried first."""
    from stoker.tune import study as studies

    if earlier is not None:
        count = studies.learn_from(study, studies.of(earlier), earlier.name)
        log.info("the sampler learns from %d trials of %s", count, earlier.name)
    for values in tries:
        study.enqueue_trial(values)


def _wait_until_free(run: RunDirectory) -> None:
    """A process of a controller that was killed, or on a machine that was lost, may be about to end."""
    until = time.monotonic() + _FREE_TIMEOUT
    while run.alive and time.monotonic() < until:
        time.sleep(0.05)


def _run(search: Search) -> tuple[int, str]:
    """Search, answering signals; returns the exit code, and why it cannot go on, where that is so."""
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)
        sys.stderr.write("\nstopping: trials end with a checkpoint, and the same command goes on\n")
        search.stop()

    previous = {number: signal.signal(number, stop) for number in STATUS}
    try:
        with trials_seen.live(search):
            search.run()
    except StokerError as error:
        return error.exit_code, str(error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if told:
        return EXIT_INTERRUPTED if STATUS[told[0]] == "interrupted" else EXIT_PREEMPTED, ""
    if search.overspent and not search.over:
        log.info("the time or the budget is used up; the same command with more of it goes on")
    return 0, ""


def _said(name: str, rule: Scheduler, unit: str) -> str:
    """A scheduler with its settings."""
    settings: dict[str, Any] = dataclasses.asdict(rule)  # type: ignore[call-overload]
    settings |= settings.pop("asha", {})
    lengths = {
        key: Duration(settings.pop(key), unit) for key in ("least", "most", "every") if key in settings
    }
    told = [f"{key} {length}" for key, length in lengths.items() if length.count < math.inf]
    rest = {key: value for key, value in settings.items() if key not in ("promotes", "planned", "finalists")}
    return ", ".join([name, *told, *(f"{key} {value:g}" for key, value in rest.items())])


def _wait_for_sinks(shipping: subprocess.Popen[bytes] | None, code: int) -> None:
    """Wait until the trackers have all of it, a minute at most; told to stop, it has no time to lose."""
    if shipping is None or code != 0:
        return
    try:
        missing = shipping.wait(_SINKS_TIMEOUT) != 0
    except subprocess.TimeoutExpired:
        missing = True
    if missing:
        log.warning("not everything is shipped to the trackers yet; the same command ships what is missing")


def _goal(metric: str, goal: str | None) -> Goal:
    found = goal or guess_goal(metric)
    if found is None:
        raise BadInput(f"--metric {metric}: say with --goal min or --goal max which way it is better")
    if found not in ("min", "max"):
        raise BadInput(f"--goal {goal}: give min or max")
    return "min" if found == "min" else "max"


@dataclass(frozen=True)
class _Places:
    """Where trials run, and how many at a time."""

    on: str
    address: str | None
    parallel: int | None
    ranks: int
    per_gpu: int
    reuse: bool


@contextlib.contextmanager
def _executor(recipe: Recipe, where: _Places) -> Iterator[Executor]:
    """What runs the trials, here or on a cluster. Raises BadInput."""
    from stoker.tune import local, on_ray

    preload = _preload(recipe)
    if where.on == _RAY:
        if where.reuse or where.per_gpu > 1:
            raise BadInput("--reuse-processes and --per-gpu are for trials on this machine: leave them out")
        with on_ray.started(
            work, address=where.address, ranks=where.ranks, parallel=where.parallel, preload=preload
        ) as workers:
            yield workers
        return
    if where.address is not None:
        raise BadInput(f"--address {where.address} is of a Ray cluster: give --on ray too, or leave it out")
    if where.per_gpu > 1 and where.ranks > 1:
        raise BadInput("--per-gpu: the ranks of one trial do not share a GPU; leave out --per-gpu or --nproc")
    gpus = visible_gpus() * where.per_gpu
    parallel = where.parallel or max(1, len(gpus) // where.ranks)
    _check_gpus(gpus, parallel, where.ranks)
    yield local.Workers(
        work, parallel=parallel, ranks=where.ranks, preload=preload, gpus=gpus, reuse=where.reuse
    )


def _check_gpus(gpus: list[str], parallel: int, nproc: int) -> None:
    if gpus and nproc > len(gpus):
        raise BadInput(
            f"--nproc {nproc}: each rank has a GPU, and there are {len(gpus)}; give a smaller --nproc"
        )
    if gpus and parallel * nproc > len(gpus):
        raise BadInput(
            f"--parallel {parallel} trials of {nproc} rank{'s' if nproc > 1 else ''} need {parallel * nproc} "
            f"GPUs, and there are {len(gpus)}: give --parallel {max(1, len(gpus) // nproc)}"
        )


def _preload(recipe: Recipe) -> list[str]:
    """What the server of the trials imports beforehand: what the recipe's module says, and its imports."""
    tree = ast.parse(recipe.source.read_text(encoding="utf-8"))
    own = {
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    return [*recipe.preload, *sorted(own - {"", "__future__"})]
