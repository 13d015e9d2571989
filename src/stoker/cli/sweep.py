"""`stoker sweep RECIPE`: search for the best values of a recipe's keys; a trial is a run."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from stoker import config as configs
from stoker import object_store, recipes
from stoker.attempt import Run
from stoker.cli import train
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, show_messages
from stoker.cli.train import MaxTime, Nproc
from stoker.duration import clock
from stoker.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, BadInput, nearest
from stoker.launch import ranks
from stoker.recipes import Recipe
from stoker.run import finding
from stoker.run.directory import RunDirectory
from stoker.run.series import guess_goal
from stoker.stopping import STATUS
from stoker.tracking import follower
from stoker.tune.schedulers import State
from stoker.world import World

if TYPE_CHECKING:
    from stoker.tune import on_ray
    from stoker.tune.local import Workers
    from stoker.tune.search import Search, Seen
    from stoker.tune.trial import Job, Link

log = logging.getLogger("stoker")

_FREE_TIMEOUT = 120.0  # of a machine that is lost, a server of files forgets its locks after 90 s, by default
_SINKS_TIMEOUT = 60.0
_ON = ("local", "ray")
_SHOWN = 12  # trials in the live table
Goal = Literal["min", "max"]


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe (llm, image), or a file with a train(run, config) function.",
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
    metric: Annotated[str, typer.Option(help="What is to become best.")] = "val_loss",
    goal: Annotated[
        str | None, typer.Option(metavar="min|max", help="Which way.", show_default="by the metric's name")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trials at a time.",
            show_default="1, or one for every --nproc GPUs of the machine; on Ray, what there is room for",
        ),
    ] = None,
    nproc: Nproc = None,
    on: Annotated[str, typer.Option(metavar="local|ray", help="Where trials run.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --on ray: the cluster, of which this machine is one.",
            show_default="RAY_ADDRESS, else Ray is started here",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="random, grid, qmc, tpe, gp, cmaes, nsga2 or nsga3.")] = "tpe",
    scheduler: Annotated[
        str, typer.Option(help="none, median, asha, asha-stop, hyperband or pbt: which trials end early.")
    ] = "none",
    least: Annotated[
        float | None,
        typer.Option(
            metavar="STEPS", help="asha, hyperband: the first rung; pbt: from one comparison to the next."
        ),
    ] = None,
    most: Annotated[
        float | None, typer.Option(metavar="STEPS", help="The length of a whole trial, for those.")
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
    max_time: MaxTime = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Search for the best values of a recipe's keys; the same command goes on with it.

    Every trial is a run in the folder of the sweep, tracked, resumed and reported as any other.
    """
    show_messages()
    from stoker.tune import record, schedulers
    from stoker.tune.space import parse, parse_tries

    if object_store.of(runs.absolute()) is not None:
        raise BadInput("--runs: a search stands on a disk, not in an object store; give a local folder")
    found = recipes.load(recipe)
    searched = parse(space or (), found.config, recipes.config_file(config))
    if not searched.parameters:
        raise BadInput("nothing is searched: give a key a range or choices, such as lr='log(1e-5, 1e-3)'")
    way = _goal(metric, goal)
    rule = schedulers.make(scheduler, least=least, most=most, factor=factor, population=trials)
    tries = tuple(searched.params(parse_tries(text)) for text in first or ())
    wanted = record.Record(
        found.reference,
        searched.described(),
        metric,
        way,
        sampler,
        _said(scheduler, rule),
        seed,
        nproc or 1,
        tries,
        warm_start,
    )
    if warm_start:
        record.check_earlier(runs / warm_start, wanted)
    name = name or f"{found.name}-sweep"
    folder = runs.absolute() / (record.free_name(runs, name) if new else name)
    deadline = time.monotonic() + clock(max_time) if max_time is not None else None

    from stoker.tune import study as studies
    from stoker.tune.search import Plan, Search

    drawn_by = studies.sampler(sampler, searched, seed)
    if sampler == "grid":
        trials = min(trials, math.prod(map(len, searched.grid().values())))
    with _executor(found, on, address, parallel, nproc or 1) as workers:
        lock = record.take(folder)
        try:
            record.begin(folder, wanted, found.source.parent)
            file = studies.JournalFile(folder / record.STUDY)
            study = studies.opened(file, drawn_by, "minimize" if way == "min" else "maximize")
            if not study.get_trials(deepcopy=False):
                with file.together():
                    _begin(study, tries, runs / warm_start if warm_start else None)
            plan = Plan(
                folder, found.reference, found.config, metric, way, trials, seed, max_failures, deadline
            )
            search = Search(plan, searched, study, file, rule, workers)
            shipping = follower.spawn_for_sweep(folder) if follower.enabled() else None
            code = _run(search, plan)
        finally:
            os.close(lock)
    _wait_for_sinks(shipping, code)
    _answer(search, plan, json)
    return code


def work(job: Job, link: Link) -> dict[str, Any]:
    """What each process of a trial does: train its run; returns how that ended."""
    from stoker.tune.trial import Reporter

    logging.getLogger("stoker").setLevel(logging.DEBUG)
    recipe = recipes.load(job.recipe)
    resolved: Any = configs.restore(recipe.config, job.values, job.sources)
    train.check(recipe, resolved.config, World.current().size)
    if World.current().rank == 0:
        _wait_until_free(finding.locate(job.runs, job.sweep, job.run))
    run = Run(
        job.sweep, job.run, config=resolved.config, runs=job.runs, sources=resolved.sources,
        recipe={"name": recipe.name, "reference": recipe.reference},
        seed=int(getattr(resolved.config, "seed", 0)), code=recipe.source.parent, provenance=job.provenance,
    )  # fmt: skip
    if job.provenance is not None:
        run.leave_shipping()
    if job.tags:
        run.tag(**job.tags)
    ranks.log_to(run.directory.logs / f"rank-{run.world.rank}.log")
    reporter = Reporter(run, job.metric, link)
    run.listen(reporter)
    _, status = train.work_on(run, recipe, resolved.config, trial=True)
    return {"status": status, "logged": sorted(reporter.logged)}


def _begin(study: Any, tries: Sequence[Mapping[str, Any]], earlier: Path | None) -> None:
    """Let a new study know what it learns from, and what is to be tried first."""
    from stoker.tune import record
    from stoker.tune import study as studies

    if earlier is not None:
        count = studies.learn_from(study, studies.read(earlier / record.STUDY), earlier.name)
        log.info("the sampler learns from %d trials of %s", count, earlier.name)
    for values in tries:
        study.enqueue_trial(values)


def _wait_until_free(run: RunDirectory) -> None:
    """A process of a controller that was killed, or on a machine that was lost, may be about to end."""
    until = time.monotonic() + _FREE_TIMEOUT
    while run.alive and time.monotonic() < until:
        time.sleep(0.05)


def _run(search: Search, plan: Any) -> int:
    """Search, answering signals; returns the exit code."""
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)
        sys.stderr.write("\nstopping: trials end with a checkpoint, and the same command goes on\n")
        search.stop()

    previous = {number: signal.signal(number, stop) for number in STATUS}
    try:
        with _shown(search, plan):
            search.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if told:
        return EXIT_INTERRUPTED if STATUS[told[0]] == "interrupted" else EXIT_PREEMPTED
    return 0


def _said(name: str, rule: Any) -> str:
    """A scheduler with its settings."""
    settings = {key: value for key, value in dataclasses.asdict(rule).items() if key != "promotes"}
    return ", ".join([name, *(f"{key} {value:g}" for key, value in settings.items())])


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


@contextlib.contextmanager
def _executor(
    recipe: Recipe, on: str, address: str | None, parallel: int | None, ranks: int
) -> Iterator[Workers | on_ray.Workers]:
    """What runs the trials, here or on a cluster. Raises BadInput."""
    from stoker.tune import local, on_ray

    if on not in _ON:
        raise BadInput(f"--on {on}: give {' or '.join(_ON)}{nearest(on, _ON)}")
    preload = _preload(recipe)
    if on == "ray":
        with on_ray.started(
            work, address=address, ranks=ranks, parallel=parallel, preload=preload
        ) as workers:
            yield workers
        return
    if address is not None:
        raise BadInput(f"--address {address} is of a Ray cluster: give --on ray too, or leave it out")
    gpus = visible_gpus()
    parallel = parallel or max(1, len(gpus) // ranks)
    _check_gpus(gpus, parallel, ranks)
    yield local.Workers(work, parallel=parallel, ranks=ranks, preload=preload, gpus=gpus)


def visible_gpus() -> list[int]:
    """The numbers of the GPUs that this process may use, without loading torch."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    if visible is None:
        return list(range(count))
    return [int(part) for part in visible.split(",") if part.strip().isdecimal()]


def _check_gpus(gpus: list[int], parallel: int, nproc: int) -> None:
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


# -- what is seen ------------------------------------------------------------------------------


@contextlib.contextmanager
def _shown(search: Search, plan: Any) -> Iterator[None]:
    """A table that is kept up to date on a terminal, a line for each trial that ends elsewhere."""
    screen = Console(stderr=True)
    if screen.is_terminal:
        with Live(_Picture(search, plan), console=screen, refresh_per_second=4, transient=True):
            yield
        return
    said: set[int] = {t.number for t in search.trials.values() if t.over}

    def say() -> None:
        for trial in search.trials.values():
            if trial.over and trial.number not in said:
                said.add(trial.number)
                log.info("%s", _line(search, trial, plan.metric))

    search.on_change(say)
    yield
    say()


class _Picture:
    """The trials as they are now; drawn anew each time it is asked for."""

    def __init__(self, search: Search, plan: Any) -> None:
        self._search, self._plan, self._begun = search, plan, time.monotonic()

    def __rich__(self) -> Group:
        trials = list(self._search.trials.values())
        table = Table(box=None, pad_edge=False)
        keys = sorted({key for trial in trials for key in trial.params})
        for column in ("trial", "state", "step", self._plan.metric, *keys):
            table.add_column(column, justify="left" if column == "state" else "right")
        running = [t for t in trials if not t.over]
        rest = [t for t in trials if t.over]
        best = self._search.best
        for trial in [*rest[-(_SHOWN - len(running[:_SHOWN])) or len(rest) :], *running[:_SHOWN]]:
            step = max(trial.values, default=0)
            table.add_row(
                str(trial.number), trial.state, f"{step:,.0f}", _number(trial.value),
                *(_number(trial.params.get(key)) for key in keys),
                style="bold" if trial is best else "dim" if trial.state in ("stopped", "failed") else "",
            )  # fmt: skip
        return Group(table, Text(self._summary(trials, best)))

    def _summary(self, trials: list[Seen], best: Seen | None) -> str:
        spent = time.monotonic() - self._begun
        said = f"{len(trials)}/{self._plan.trials} trials: {_counted(trials)}; {spent:,.0f} s"
        return said + _best_so_far(best)


def _counted(trials: Iterable[Seen]) -> str:
    """How many trials are in which state."""
    counts = Counter(trial.state for trial in trials)
    return ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])


def _best_so_far(best: Seen | None) -> str:
    return f"; best {_number(best.value)} of trial {best.number}" if best else ""


def _line(search: Search, trial: Seen, metric: str) -> str:
    params = " ".join(f"{key}={_number(value)}" for key, value in trial.params.items())
    what = f"{metric} {_number(trial.value)}" if trial.state != "failed" else trial.error.splitlines()[0]
    return f"trial {trial.number} {trial.state}: {what} ({params}){_best_so_far(search.best)}"


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def _answer(search: Search, plan: Any, json: bool) -> None:
    best = search.best
    if json:
        print_json({
            "sweep": str(plan.folder), "metric": plan.metric, "goal": plan.goal, "over": search.over,
            "best": best and _told(best, plan), "trials": [_told(t, plan) for t in search.trials.values()],
        })  # fmt: skip
        return
    out = console()
    out.print(f"\n{plan.folder.name}: {_counted(search.trials.values()) or 'no trials'}")
    if best is not None:
        out.print(f"  {'best ' + plan.metric:24} {_number(best.value)}")
        for key, value in best.params.items():
            out.print(f"  {key:24} {_number(value)}")
        out.print(f"  {'trial':24} {plan.folder.name}/{best.run}")
        out.print(f"next: stoker runs show {plan.folder.name}/{best.run}   stoker report {plan.folder.name}")


def _told(trial: Seen, plan: Any) -> dict[str, Any]:
    return {
        "number": trial.number, "state": trial.state, "params": trial.params, "value": trial.value,
        "parent": trial.parent,
        "values": [[int(step), value] for step, value in trial.values.items()],
        "run": str(plan.folder / trial.run), "error": trial.error or None,
    }  # fmt: skip
