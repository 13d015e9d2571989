"""Checks, starts and runs a search requested on the command line or from Python."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study
from stoker import config as configs
from stoker import object_store, signals, terminal
from stoker.cli.search_options import Places, SearchOptions
from stoker.cli.trial import loaded, train_trial
from stoker.duration import Duration
from stoker.errors import BadInput, Stopped
from stoker.launch.targets import RAY
from stoker.machine import visible_gpus
from stoker.periodic import Periodic, Task
from stoker.recipes import Recipe
from stoker.run import finding
from stoker.run.series import guess_goal
from stoker.tracking import sinks
from stoker.tracking.shipping import SweepShipping
from stoker.tune import local, on_ray, peers, plan, record, samplers, schedulers, stores, tables
from stoker.tune import study as studies
from stoker.tune.executor import Executor
from stoker.tune.plan import Budget, Goal, Objective, Plan
from stoker.tune.record import Record
from stoker.tune.schedulers import Scheduler
from stoker.tune.search import Search
from stoker.tune.space import Space
from stoker.tune.stores import Kept
from stoker.words import counted

log = logging.getLogger("stoker")

_SINKS_TIMEOUT = 60.0
_SINKS_SECONDS = 2.0  # between looks at the process that ships
_TRIALS = 20
_LOOKED_AT = 10  # points sampled from a space, besides its ends


@dataclass(frozen=True, kw_only=True)
class Asked(SearchOptions):
    """The request for a search: the options, and what they are applied to."""

    recipe: Recipe
    space: Space
    runs: Path
    tries: tuple[Mapping[str, Any], ...] = ()
    """Values to try first, in the form of the space's `params`."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked search, ready to start."""

    asked: Asked
    record: Record
    folder: Path
    """The sweep's folder."""
    objectives: tuple[Objective, ...]
    trials: int
    rule: Scheduler
    sampler: BaseSampler
    unit: str
    whole: float | None
    budget: Budget | None


def prepare(asked: Asked) -> Prepared:
    """Check the request, without writing anything. Raises BadInput."""
    _check_counts(asked)
    asked = dataclasses.replace(asked, storage=stores.absolute(asked.storage))
    if object_store.of(asked.runs) is not None:
        raise BadInput("--runs: a search cannot be kept in an object store; give a local folder")
    searched = asked.space
    if not searched.parameters:
        raise BadInput(
            "the search space is empty: give a key a range or choices, such as lr='log(1e-5, 1e-3)'"
        )
    objectives = _objectives(asked.metric or [asked.recipe.best], asked.goal or ())
    sampler, scheduler = _ways(asked, several=len(objectives) > 1)
    _check_ways(asked, sampler, scheduler)
    shortest, whole, unit = plan.span(asked.least, asked.most)
    trials = _trials(asked, sampler)
    rule = schedulers.make(
        scheduler, least=shortest, most=whole, population=asked.trials or trials,
        **_settings(asked, scheduler),
    )  # fmt: skip
    if scheduler == "pb2" and importlib.util.find_spec("sklearn") is None:
        raise BadInput("--scheduler pb2 needs scikit-learn: pip install scikit-learn")
    if unit == plan.SHARE:
        _check_shares(searched, rule)
    name = finding.checked(asked.name or f"{asked.recipe.name}-sweep")
    folder = asked.runs / (record.free_name(asked.runs, name) if asked.new else name)
    wanted = Record(
        recipe=record.resolved(asked.recipe.reference),
        space=searched.described(),
        metric=", ".join(one.metric for one in objectives),
        goal=", ".join(one.goal for one in objectives),
        sampler=sampler,
        scheduler=_described(scheduler, rule, unit),
        seed=asked.seed,
        nproc=asked.ranks,
        tries=asked.tries,
        warm_start=asked.warm_start,
        storage=record.shown(asked.storage) if asked.storage else "",
        study=(asked.study or folder.name) if asked.storage else "",
    )
    record.check(folder, wanted)
    if asked.storage and scheduler in schedulers.POPULATIONS:
        raise BadInput(f"--storage: {scheduler} copies checkpoints within one folder; leave out --storage")
    if asked.warm_start and not record.is_sweep(folder):
        record.check_earlier(asked.runs / asked.warm_start, wanted)
    if len(asked.tries) > trials:
        raise BadInput(
            f"{len(asked.tries)} --try for {counted(trials, 'trial')}: give as many --trials, or fewer"
        )
    budget = Budget.parse(asked.budget) if asked.budget is not None else None
    counts_by = plan.unit_of(unit, budget, counts=bool(asked.least or asked.most))
    _check_points(asked)
    return Prepared(
        asked=asked,
        record=wanted,
        folder=folder,
        objectives=objectives,
        trials=trials,
        rule=rule,
        sampler=samplers.make(sampler, searched, asked.seed, trials),
        unit=counts_by,
        whole=whole,
        budget=budget,
    )


@contextlib.contextmanager
def begun(
    made: Prepared, on: str, places: Places, deadline: float | None
) -> Iterator[tuple[Search, SweepShipping]]:
    """The search, new or continued, and the process that ships its trials.

    The block holds the lock of the sweep's folder. Raises BadInput.

    Args:
        on: local or ray.
        deadline: when the search stops, by the machine's monotonic clock.
    """
    asked = made.asked
    with _executor(asked, on, places) as workers:
        there = made.folder.exists()
        lock = record.take(made.folder)
        try:
            planned = Plan(
                folder=made.folder,
                recipe=asked.recipe.reference,
                config=asked.recipe.config,
                objectives=made.objectives,
                trials=made.trials,
                provenance=record.provenance_of(made.folder, asked.recipe.code),
                seed=asked.seed,
                ranks=asked.ranks,
                unit=made.unit,
                whole=made.whole,
                max_failures=asked.max_failures,
                budget=made.budget,
                deadline=deadline,
            )
            try:
                search = _search(made, planned, workers)
            except BadInput:
                if not there:
                    shutil.rmtree(made.folder)
                raise
            with _shipped(made.folder) as shipping:
                yield search, shipping
        finally:
            os.close(lock)


@contextlib.contextmanager
def _shipped(folder: Path) -> Iterator[SweepShipping]:
    """Keep a process running that ships the trials of a search to the trackers, if there are any."""
    shipping = SweepShipping(folder, sinks.enabled())
    sinks.say_what_is_disabled()
    shipping.begin()
    looking = Periodic([Task(_SINKS_SECONDS, shipping.look_after)])
    try:
        yield shipping
    finally:
        looking.close()
        shipping.finish()


@contextlib.contextmanager
def answering_signals(search: Search) -> Iterator[list[int]]:
    """Stop the search on a signal within this block; the list receives the signal.

    A second request, see `signals.Requests`, raises KeyboardInterrupt or Stopped. Outside the main
    thread, signals are not handled.
    """
    told: list[int] = []
    requests = signals.Requests()

    def stop(number: int, frame: FrameType | None) -> None:
        if not requests.is_new(number):
            return
        if requests.count > 1:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(signals.STATUS[number])
        told.append(number)
        terminal.say("\nstopping: trials save a checkpoint; the same search continues when run again\n")
        search.stop()

    with signals.handled(stop, signals.STATUS):
        yield told


def wait_for_sinks(shipping: SweepShipping) -> None:
    """Wait at most a minute until the trackers have the whole search."""
    if not shipping.wait(_SINKS_TIMEOUT):
        log.warning(
            "not everything is shipped to the trackers yet; running the same search again ships the rest"
        )


def _trials(asked: Asked, sampler: str) -> int:
    """The number of trials. Raises BadInput for a grid without end."""
    if sampler != "grid":
        return _TRIALS if asked.trials is None else asked.trials
    points = len(asked.space.combinations())
    trials = points if asked.trials is None else min(asked.trials, points)
    if trials < points:
        log.info("%d of the %d points of the grid are searched; without --trials, all are", trials, points)
    return trials


def _check_counts(asked: Asked) -> None:
    """Raises BadInput. The command line already checks most of this."""
    lowest = {"trials": 1, "nproc": 1, "factor": 2, "seed": 0, "max_failures": 0}
    for name, low in lowest.items():
        value = getattr(asked, name)
        optional = name != "seed"
        if not (optional and value is None) and (not isinstance(value, int) or value < low):
            raise BadInput(f"--{name.replace('_', '-')} {value}: give a whole number of {low} or more")
    for name in ("quantile", "resample"):
        value = getattr(asked, name)
        if value is not None and not isinstance(value, int | float):
            raise BadInput(f"--{name} {value!r}: give a number such as 0.25")
    if asked.study and not asked.storage:
        raise BadInput(f"--study {asked.study} names a study in --storage; also give --storage")


def _settings(asked: Asked, scheduler: str) -> dict[str, Any]:
    """The given scheduler settings, besides lengths. Raises BadInput if another scheduler's are given."""
    halving = {"factor": asked.factor}
    population = {"quantile": asked.quantile, "resample": asked.resample, "factors": asked.perturb}
    found: dict[str, Any] = {k: v for k, v in {**halving, **population}.items() if v is not None}
    if found.keys() & population.keys() and scheduler not in schedulers.POPULATIONS:
        names = " and ".join(schedulers.POPULATIONS)
        raise BadInput(f"--quantile, --resample and --perturb are for --scheduler {names}; leave them out")
    if "factor" in found and scheduler not in schedulers.HALVING:
        names = ", ".join(schedulers.HALVING[:-1])
        raise BadInput(f"--factor is for --scheduler {names} and --strategy staged; leave it out")
    if asked.perturb is not None:
        try:
            low, high = map(float, asked.perturb.split(","))
        except ValueError:
            raise BadInput(f"--perturb {asked.perturb}: give two factors, such as 0.8,1.2") from None
        found["factors"] = (low, high)
    return found


def _check_shares(searched: Space, rule: Scheduler) -> None:
    """Refuse shares of the data if the scheduler or the recipe does not support them.

    Raises BadInput, also where the recipe's config refuses a share beside some values of the space.
    """
    if not rule.lengths(0):
        raise BadInput("a share of the data is for asha, asha-stop, hyperband and --strategy staged")
    if "data_share" not in configs.describe(searched.config):
        raise BadInput(
            "a share of the data: the recipe has no key data_share; let its config inherit from "
            "stoker.Training, and pass the config to its Trainer"
        )
    if "data_share" in searched.described():
        raise BadInput("data_share is given twice, as a key and by --least and --most: leave out the key")
    least = f"data_share={rule.lengths(0)[0] / 100}"
    for overrides in _points(searched):
        try:
            configs.resolve(searched.config, overrides)
        except BadInput:
            continue  # this trial would fail with any share
        configs.resolve(searched.config, [*overrides, least])


def _check_points(asked: Asked) -> None:
    """Refuse a search if every trial would be refused with the same message. Raises BadInput."""
    check, refused = asked.recipe.check, set()
    if check is None:
        return
    for overrides in _points(asked.space):
        try:
            check(configs.resolve(asked.space.config, overrides).config)
            return
        except BadInput as error:
            refused.add(str(error))
    if len(refused) == 1:
        raise BadInput(*refused)


def _points(searched: Space) -> Iterator[list[str]]:
    """Sample points across a space, always the same, in the form that `configs.resolve` takes."""
    yield from map(searched.overrides, searched.spanning())
    for seed in range(_LOOKED_AT):
        yield searched.overrides(searched.drawn(np.random.default_rng(seed)))


def _objectives(metrics: Sequence[str], goals: Sequence[str]) -> tuple[Objective, ...]:
    """The metrics to optimise, with their goals. Raises BadInput."""
    ways: Sequence[str | None] = goals or [None] * len(metrics)
    if len(set(metrics)) < len(metrics):
        raise BadInput(f"--metric {' --metric '.join(metrics)}: give each metric once")
    if len(goals) not in (0, len(metrics)):
        raise BadInput(
            f"{len(goals)} --goal for {len(metrics)} --metric: give one for each, in the same order"
        )
    return tuple(Objective(metric, _goal(metric, way)) for metric, way in zip(metrics, ways, strict=True))


def _goal(metric: str, goal: str | None) -> Goal:
    found = goal or guess_goal(metric)
    if found is None:
        raise BadInput(f"--metric {metric}: its direction is not known; give --goal min or --goal max")
    if found not in ("min", "max"):
        raise BadInput(f"--goal {goal}: give min or max")
    return "min" if found == "min" else "max"


def _ways(asked: Asked, *, several: bool) -> tuple[str, str]:
    """The names of the sampler and of the scheduler. Raises BadInput."""
    if asked.strategy is not None:
        if asked.strategy != samplers.STAGED:
            raise BadInput(f"--strategy {asked.strategy}: the only strategy is {samplers.STAGED}")
        if asked.sampler or asked.scheduler:
            raise BadInput(
                "--strategy staged sets the sampler and the scheduler: leave out --sampler and --scheduler"
            )
        return samplers.STAGED, samplers.STAGED
    sampler = asked.sampler or "tpe"
    for option, name in (("--sampler", asked.sampler), ("--scheduler", asked.scheduler)):
        if name == samplers.STAGED:
            raise BadInput(f"{option} {name}: this is a strategy; give --strategy {name}")
    if several and sampler in samplers.SAMPLERS and sampler not in samplers.SEVERAL:
        raise BadInput(
            f"--sampler {sampler} optimises one metric; for several give {', '.join(samplers.SEVERAL)}"
        )
    return sampler, asked.scheduler or "none"


def _check_ways(asked: Asked, sampler: str, scheduler: str) -> None:
    """Refuse options that the sampler or the scheduler does not use. Raises BadInput."""
    if scheduler == "none" and (asked.least or asked.most):
        raise BadInput(
            "--least and --most are for a --scheduler that ends trials early: give one, or leave them out"
        )
    if asked.tries and sampler == "grid":
        raise BadInput("--try: the grid sampler tries every value; leave it out")
    if asked.warm_start and sampler == samplers.STAGED:
        raise BadInput("--warm-start: --strategy staged starts at random; leave out one of the two")


def _search(made: Prepared, planned: Plan, workers: Executor) -> Search:
    """The search with its study, new or existing. Raises BadInput."""
    asked, wanted = made.asked, made.record
    continues = record.is_sweep(made.folder)
    kept = _kept(made.folder, asked.storage, new=not continues)
    if continues:
        _check_exists(kept, made.folder, wanted)
    goals = [one.goal for one in made.objectives]
    study = studies.opened(kept, made.sampler, goals, wanted.study or studies.NAME)
    if wanted.study:
        record.check_study(study, wanted)
    if asked.storage and asked.study is None and not record.is_sweep(made.folder):
        _check_nobodys(study, wanted)
    with kept.alone():  # controllers that start at the same time must not all begin it
        if not study.get_trials(deepcopy=False):
            with kept.together():
                _begin(study, asked, asked.runs / asked.warm_start if asked.warm_start else None)
    record.begin(made.folder, wanted)
    if made.whole is not None and study.user_attrs.get("whole") != made.whole:
        study.set_user_attr("whole", made.whole)  # the length of a trial that is not ended early
    if "rungs" not in study.user_attrs:
        study.set_user_attr("rungs", [*made.rule.lengths(0)][:-1])
    others = peers.Peers(study, record.uid(made.folder), planned.first) if wanted.study else None
    return Search(planned, asked.space, study, kept, made.rule, workers, others)


def _check_nobodys(study: Study, wanted: Record) -> None:
    """Raises BadInput if a study that should be new has trials of a search in another folder."""
    count = sum(tables.BY in trial.user_attrs for trial in study.get_trials(deepcopy=False))
    if count:
        raise BadInput(
            f"the study {wanted.study} in {wanted.storage} has {counted(count, 'trial')} of a search in "
            f"another folder: give --study {wanted.study} to search together with it, or another --name"
        )


def _check_exists(kept: Kept, folder: Path, wanted: Record) -> None:
    """Raises BadInput for runs of a study that is gone: a new one would take them for its own."""
    if any(folder.glob("*/run.json")) and not studies.exists(kept, wanted.study or studies.NAME):
        raise BadInput(
            f"the study of the search in {folder} is not in {wanted.storage or record.STUDY}: restore it, or "
            "give another --name or --new to start a separate search"
        )


def _kept(folder: Path, url: str, *, new: bool) -> Kept:
    return stores.Database(url, new=new) if url else stores.JournalFile(folder / record.STUDY)


def _begin(study: Any, asked: Asked, earlier: Path | None) -> None:
    """Add to a new study the trials to learn from and the values to try first."""
    if earlier is not None:
        count, outside = studies.learn_from(study, studies.of(earlier), earlier.name, asked.space)
        others = f"; {counted(outside, 'other')} had values outside this space" if outside else ""
        log.info("the sampler learns from %s of %s%s", counted(count, "trial"), earlier.name, others)
    for values in asked.tries:
        study.enqueue_trial(values)


def _described(name: str, rule: Scheduler, unit: str) -> str:
    """A scheduler and its settings, as text."""
    settings: dict[str, Any] = dataclasses.asdict(rule)  # type: ignore[call-overload]
    settings |= settings.pop("asha", {})
    lengths = {
        key: Duration(settings.pop(key), unit) for key in ("least", "most", "every") if key in settings
    }
    told = [f"{key} {length}" for key, length in lengths.items() if length.count < math.inf]
    settings |= dict(zip(("lower", "upper"), settings.pop("factors", ()), strict=False))
    unsaid = ("promotes", "planned", "finalists", "learns")
    rest = {key: value for key, value in settings.items() if key not in unsaid}
    return ", ".join([name, *told, *(f"{key} {value:g}" for key, value in rest.items())])


@contextlib.contextmanager
def _executor(asked: Asked, on: str, where: Places) -> Iterator[Executor]:
    """The executor of the trials, here or on a Ray cluster. Raises BadInput."""
    for name, value in (("--parallel", where.parallel), ("--per-gpu", where.per_gpu)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise BadInput(f"{name} {value!r}: give a whole number of 1 or more")
    recipe, ranks = asked.recipe, asked.ranks
    preload = _preload(recipe)
    if on == RAY:
        if where.reuse or where.per_gpu > 1:
            raise BadInput("--reuse-processes and --per-gpu are for trials on this machine: leave them out")
        with on_ray.started(
            train_trial, address=where.address, ranks=ranks, parallel=where.parallel, preload=preload
        ) as workers:
            yield workers
        return
    if where.address is not None:
        raise BadInput(f"--address {where.address} names a Ray cluster: also give --on ray, or leave it out")
    if where.per_gpu > 1 and ranks > 1:
        raise BadInput("--per-gpu: ranks of one trial cannot share a GPU; leave out --per-gpu or --nproc")
    gpus = visible_gpus() * where.per_gpu
    parallel = where.parallel or max(1, len(gpus) // ranks)
    _check_gpus(gpus, parallel, ranks)
    yield local.Workers(
        train_trial, parallel=parallel, ranks=ranks, preload=preload, gpus=gpus, reuse=where.reuse,
        ready=functools.partial(loaded, recipe.reference),
    )  # fmt: skip


def _check_gpus(gpus: list[str], parallel: int, nproc: int) -> None:
    if gpus and nproc > len(gpus):
        raise BadInput(
            f"--nproc {nproc}: each rank needs a GPU, and there are {len(gpus)}; give a smaller --nproc"
        )
    if gpus and parallel * nproc > len(gpus):
        raise BadInput(
            f"--parallel {counted(parallel, 'trial')} of {counted(nproc, 'rank')} need {parallel * nproc} "
            f"GPUs, and there are {len(gpus)}: give --parallel {max(1, len(gpus) // nproc)}"
        )


def _preload(recipe: Recipe) -> list[str]:
    """The modules that the trial server preloads: the recipe's `preload`, and its module's imports."""
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
