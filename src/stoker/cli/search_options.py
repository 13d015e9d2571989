"""The options of `stoker sweep`, as values: what is searched for, and where the trials run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from stoker.cli.options import Nproc


@dataclass(frozen=True)
class SearchOptions:
    """What a search does. `stoker.sweep` has them too, see there and docs/sweeps.md."""

    name: Annotated[
        str | None,
        typer.Option(
            help="The sweep's folder; the same command with the same name continues the search.",
            show_default="RECIPE-sweep",
        ),
    ] = None
    new: Annotated[bool, typer.Option("--new", help="Start a new search, named NAME-2 if NAME exists.")] = (
        False
    )
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="The metric to optimise; repeatable. Early stopping uses the first.",
            show_default="the recipe's: val_accuracy of image and text, else val_loss",
        ),
    ] = None
    goal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="min|max", help="The direction of each metric.", show_default="by the metric's name"
        ),
    ] = None
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Number of trials.", show_default="20; for a grid, all of its points"),
    ] = None
    nproc: Nproc = None
    sampler: Annotated[
        str | None,
        typer.Option(help="random, grid, qmc, tpe, gp, cmaes, nsga2 or nsga3.", show_default="tpe"),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="What ends trials early: none, median, asha, asha-stop, hyperband, pbt or pb2.",
            show_default="none",
        ),
    ] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="staged",
            help="Replaces --sampler and --scheduler for long trainings: half of the trials are random, the "
            "others sampled by tpe, all stopped early as by asha; then the best few run to their end.",
        ),
    ] = None
    least: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="asha, hyperband: the first rung, as 100 (steps), 1ep, 1000000tok, or 10% of the data; "
            "pbt, pb2: the interval between comparisons.",
        ),
    ] = None
    most: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="The length of a full trial, for the same schedulers."),
    ] = None
    factor: Annotated[
        int | None,
        typer.Option(
            min=2, help="asha, hyperband: one trial in N continues to the next rung.", show_default="3"
        ),
    ] = None
    quantile: Annotated[
        float | None,
        typer.Option(
            help="pbt, pb2: the share of trials replaced by copies of the best.", show_default="0.25"
        ),
    ] = None
    resample: Annotated[
        float | None,
        typer.Option(
            help="pbt: the probability that a copy's value is resampled; pb2: the same, at first.",
            show_default="0.25",
        ),
    ] = None
    perturb: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR,FACTOR",
            help="pbt: a value that is not resampled is multiplied by one of these.",
            show_default="0.8,1.2",
        ),
    ] = None
    warm_start: Annotated[
        str, typer.Option("--warm-start", metavar="SWEEP", help="Let the sampler learn from another sweep.")
    ] = ""
    seed: Annotated[int, typer.Option(min=0, help="The sampler's seed.")] = 0
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="End the search after more failed trials than this.")
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="End the search once all trials together have used: 40gpuh (of all ranks), 300ep, 20000.",
        ),
    ] = None
    storage: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="STOKER_STORAGE",
            help="Keep the study in a database that several controllers can share, such as "
            "postgresql+psycopg2://HOST/NAME.",
            show_default="a file beside the trials",
        ),
    ] = ""
    study: Annotated[
        str | None,
        typer.Option(
            help="The study's name in --storage; sweeps with the same study search together.",
            show_default="NAME",
        ),
    ] = None

    @property
    def ranks(self) -> int:
        """Ranks of each trial."""
        return self.nproc or 1


@dataclass(frozen=True)
class Places:
    """Where trials run, and how many at a time."""

    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of concurrent trials.",
            show_default="as many as the machine's GPUs allow, else 1; on Ray, as many as fit",
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --on ray: the cluster's address; this machine must be one of its nodes.",
            show_default="RAY_ADDRESS, else Ray is started here",
        ),
    ] = None
    per_gpu: Annotated[int, typer.Option(min=1, help="Number of ranks that share a GPU.")] = 1
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse-processes",
            help="Train trials one after another in the same process, for trials of a second or less. "
            "Trials then share the process's state.",
        ),
    ] = False


DEFAULT_SEARCH = SearchOptions()
DEFAULT_PLACES = Places()
