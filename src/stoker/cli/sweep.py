"""`stoker sweep RECIPE`: search for the best values of a recipe's keys; each trial is a run."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from stoker import duration, recipes
from stoker.cli import submit
from stoker.cli import trials as trials_seen
from stoker.cli.options import MaxTime, Nproc
from stoker.cli.output import DEFAULT_RUNS, Json, LocalRunsFolder, show_messages
from stoker.cli.submit import HERE, Command, Where
from stoker.errors import EXIT_FAILED, STOP_CODES, BadInput, StokerError
from stoker.launch import targets
from stoker.launch.targets import LOCAL, RAY, TARGETS
from stoker.recipes import Recipe
from stoker.stopping import STATUS

if TYPE_CHECKING:
    from stoker.tune.record import Record
    from stoker.tune.search import Search
    from stoker.tune.space import Space

log = logging.getLogger("stoker")

_On = Annotated[
    str,
    typer.Option(
        metavar="|".join(dict.fromkeys((LOCAL, RAY, *TARGETS))),
        help="Where trials run: here, on a Ray cluster, or within a job that runs the search.",
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
            "dropout='uniform(0, 0.5)'; KEY=VALUE fixes a key in all trials.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="A YAML file of search spaces and fixed values."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="The sweep's folder; the same command with the same name continues the search.",
            show_default="RECIPE-sweep",
        ),
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Start a new search, named NAME-2 if NAME exists.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="The metric to optimise; repeatable. Early stopping uses the first.",
            show_default="the recipe's: val_accuracy of image and text, else val_loss",
        ),
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="min|max", help="The direction of each metric.", show_default="by the metric's name"
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Number of trials.", show_default="20; for a grid, all of its points"),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of concurrent trials.",
            show_default="as many as the machine's GPUs allow, else 1; on Ray, as many as fit",
        ),
    ] = None,
    nproc: Nproc = None,
    controllers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="For jobs: submit an array of N controllers that share the study in --storage.",
        ),
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --on ray: the cluster's address; this machine must be one of its nodes.",
            show_default="RAY_ADDRESS, else Ray is started here",
        ),
    ] = None,
    per_gpu: Annotated[int, typer.Option(min=1, help="Number of ranks that share a GPU.")] = 1,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse-processes",
            help="Train trials one after another in the same process, for trials of a second or less. "
            "Trials then share the process's state.",
        ),
    ] = False,
    sampler: Annotated[
        str | None,
        typer.Option(help="random, grid, qmc, tpe, gp, cmaes, nsga2 or nsga3.", show_default="tpe"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="What ends trials early: none, median, asha, asha-stop, hyperband, pbt or pb2.",
            show_default="none",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="staged",
            help="Replaces --sampler and --scheduler for long trainings: half of the trials are random, the "
            "others sampled by tpe, all stopped early as by asha; then the best few run to their end.",
        ),
    ] = None,
    least: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="asha, hyperband: the first rung, as 100 (steps), 1ep, 1000000tok, or 10% of the data; "
            "pbt, pb2: the interval between comparisons.",
        ),
    ] = None,
    most: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="The length of a full trial, for the same schedulers."),
    ] = None,
    factor: Annotated[
        int | None,
        typer.Option(
            min=2, help="asha, hyperband: one trial in N continues to the next rung.", show_default="3"
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            help="pbt, pb2: the share of trials replaced by copies of the best.", show_default="0.25"
        ),
    ] = None,
    resample: Annotated[
        float | None,
        typer.Option(
            help="pbt: the probability that a copy's value is resampled; pb2: the same, at first.",
            show_default="0.25",
        ),
    ] = None,
    perturb: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR,FACTOR",
            help="pbt: a value that is not resampled is multiplied by one of these.",
            show_default="0.8,1.2",
        ),
    ] = None,
    first: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="KEY=VALUE,...", help="Values to try first; repeatable."),
    ] = None,
    warm_start: Annotated[
        str, typer.Option("--warm-start", metavar="SWEEP", help="Let the sampler learn from another sweep.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="The sampler's seed.")] = 0,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="End the search after more failed trials than this.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="End the search once all trials together have used: 40gpuh (of all ranks), 300ep, 20000.",
        ),
    ] = None,
    max_time: MaxTime = None,
    storage: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="STOKER_STORAGE",
            help="Keep the study in a database that several controllers can share, such as "
            "postgresql+psycopg2://HOST/NAME.",
            show_default="a file beside the trials",
        ),
    ] = "",
    study: Annotated[
        str | None,
        typer.Option(
            help="The study's name in --storage; sweeps with the same study search together.",
            show_default="NAME",
        ),
    ] = None,
    runs: LocalRunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Search for the best values of a recipe's keys. The same command continues the search.

    Each trial is a run in the sweep's folder, tracked, resumed and reported like any other run.
    """
    show_messages()
    from stoker.cli import searching

    _check_where(where, controllers, storage)
    found = recipes.load(recipe)
    searched, tries = _space(found, space or (), config, first or ())
    asked = searching.Asked(
        recipe=found, space=searched, runs=runs.absolute(), name=name, new=new, metrics=metric or (),
        goals=goal or (), trials=trials, nproc=nproc or 1, sampler=sampler, scheduler=scheduler,
        strategy=strategy, least=least, most=most, factor=factor, quantile=quantile, resample=resample,
        perturb=perturb, tries=tries, warm_start=warm_start,
        seed=seed, max_failures=max_failures, budget=budget, storage=storage, study=study,
    )  # fmt: skip
    made = searching.prepare(asked)
    deadline = _deadline(max_time, where)
    if where.on not in (LOCAL, RAY):
        ranks_at_once = (nproc or 1) * (parallel or 1) // per_gpu or 1
        return _submit(where, made.folder, made.record, controllers, ranks_at_once, json)
    if where.dry_run:
        return submit.print_command(where, Command.of_verb("sweep"), nproc=nproc or 1, json=json)
    places = searching.Places(where.on, address, parallel, nproc or 1, per_gpu, reuse)
    with searching.begun(made, places, deadline) as (search, shipping):
        code, error = _run(search)
    if code == 0:  # a search that was told to stop must exit quickly
        searching.wait_for_sinks(shipping)
    trials_seen.answer(search, json=json, error=error)
    return code


def _check_where(where: Where, controllers: int, storage: str) -> None:
    """Raises BadInput."""
    if where.on == RAY:
        for name in ("gpus", "cpus", "memory", "time", "retries", "env", "option", "dry_run"):
            if getattr(where, name) != getattr(HERE, name):
                option = f"--{name.replace('_', '-')}"
                raise BadInput(f"{option} is for jobs; --on ray submits none, so leave it out")
    elif not where.here:
        targets.of(where.on)
    if where.here and where.retries:
        raise BadInput("--retries: failed trials are not retried; leave it out, see --max-failures")
    if controllers > 1 and where.on in (LOCAL, RAY):
        raise BadInput(f"--controllers {controllers} is for jobs: also give --on {' or '.join(TARGETS)}")
    if controllers > 1 and not storage:
        raise BadInput(
            f"--controllers {controllers}: several controllers need a study in a database; give "
            "--storage postgresql+psycopg2://HOST/NAME, or set STOKER_STORAGE"
        )


def _deadline(max_time: str | None, where: Where) -> float | None:
    """When the search stops on this machine, by its monotonic clock. Raises BadInput."""
    from stoker.tune import plan

    limits = [duration.limit("--time", where.time)] if where.here and where.time is not None else []
    return plan.deadline(max_time, *limits)


def _submit(where: Where, folder: Path, wanted: Record, controllers: int, ranks: int, json: bool) -> int:
    """Submit the search: one job, or an array of jobs that share a study. Raises BadInput.

    Args:
        folder: the sweep's folder; the elements of an array append their number to its name.
        ranks: ranks that train concurrently in each job.
    """
    from stoker.tune import record, stores

    command = Command.of_verb("sweep")
    if command.has("--storage") and wanted.storage != stores.absolute(command.value("--storage")):
        raise BadInput(
            "--storage: the password would be written to a file; set STOKER_STORAGE instead, or put the "
            "password in ~/.pgpass"
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
    """The search space, and the values to try first. Raises BadInput."""
    from stoker.tune.space import parse, parse_tries

    searched = parse(given, recipe.config, recipes.config_file(config))
    return searched, tuple(searched.params(parse_tries(text)) for text in first)


def _run(search: Search) -> tuple[int, str]:
    """Search, handling signals; returns the exit code and the error, if any."""
    from stoker.cli.searching import answering_signals

    try:
        with answering_signals(search) as told, trials_seen.live(search):
            search.run()
    except StokerError as error:
        return error.exit_code, str(error)
    if told:
        return STOP_CODES[STATUS[told[0]]], ""
    failed = [trial for trial in search.trials.values() if trial.state == "failed"]
    if failed and search.over and len(failed) == len(search.trials):
        said = failed[0].error.partition("\n")[0]
        name = search.plan.folder.name
        return EXIT_FAILED, f"every trial failed, the first with: {said}; see stoker report {name}"
    if search.overspent and not search.over:
        log.info("the time or the budget is used up; run the same command with more of it to continue")
    return 0, ""
