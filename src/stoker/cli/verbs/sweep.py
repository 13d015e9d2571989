"""`stoker sweep RECIPE`: search for the best values of a recipe's keys; each trial is a run."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from stoker import duration, recipes, signals
from stoker.cli import submit
from stoker.cli import trials as trials_seen
from stoker.cli.options import MaxTime
from stoker.cli.output import DEFAULT_RUNS, Json, LocalRunsFolder, show_messages
from stoker.cli.search_options import DEFAULT_PLACES, DEFAULT_SEARCH, Places, SearchOptions
from stoker.cli.submit import HERE, Command, Where
from stoker.errors import EXIT_FAILED, STOP_CODES, BadInput, StokerError
from stoker.launch import targets
from stoker.launch.targets import LOCAL, RAY, TARGETS
from stoker.recipes import Recipe

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
    options: SearchOptions = DEFAULT_SEARCH,
    places: Places = DEFAULT_PLACES,
    controllers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="For jobs: submit an array of N controllers that share the study in --storage.",
        ),
    ] = 1,
    first: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="KEY=VALUE,...", help="Values to try first; repeatable."),
    ] = None,
    max_time: MaxTime = None,
    runs: LocalRunsFolder = DEFAULT_RUNS,
    json: Json = False,
    where: Where = HERE,
) -> int:
    """Search for the best values of a recipe's keys. The same command continues the search.

    Each trial is a run in the sweep's folder, tracked, resumed and reported like any other run.
    """
    show_messages()
    from stoker.cli import searching

    _check_where(where, controllers, options.storage)
    found = recipes.load(recipe)
    searched, tries = _space(found, space or (), config, first or ())
    asked = searching.Asked(**vars(options), recipe=found, space=searched, tries=tries, runs=runs.absolute())
    made = searching.prepare(asked)
    deadline = _deadline(max_time, where)
    if where.on not in (LOCAL, RAY):
        ranks_at_once = asked.ranks * (places.parallel or 1) // places.per_gpu or 1
        return _submit(where, made.folder, made.record, controllers, ranks_at_once, json)
    if where.dry_run:
        return submit.print_command(where, Command.of_verb("sweep"), nproc=asked.ranks, json=json)
    with searching.begun(made, where.on, places, deadline) as (search, shipping):
        code, error = _run(search)
    if code == 0:  # a search that was told to stop must exit quickly
        with signals.cut_short():
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
    from stoker.tune.space_reading import parse, parse_tries

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
        return STOP_CODES[signals.STATUS[told[0]]], ""
    if failed := trials_seen.all_failed(search):
        return EXIT_FAILED, failed
    if search.overspent and not search.over:
        log.info("the time or the budget is used up; run the same command with more of it to continue")
    return 0, ""
