"""`stoker bench scaling RECIPE`: throughput, memory and waiting by the number of ranks."""

from __future__ import annotations

import json as json_module
import logging
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from stoker import config as configs
from stoker import machine, recipes
from stoker.cli import train
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, show_messages
from stoker.cli.train import Job, Overrides
from stoker.config import Resolved
from stoker.duration import Duration
from stoker.errors import BadInput
from stoker.launch import local
from stoker.recipes import Recipe
from stoker.report import scaling as report
from stoker.run import directory, finding, view
from stoker.words import counted

Way = tuple[str, int, int]  # strong or weak, ranks, global batch

log = logging.getLogger("stoker")

app = typer.Typer(help="Measure a recipe on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure a recipe on this machine."""


@app.command()
def scaling(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a file.")],
    overrides: Overrides = None,
    nproc: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks to measure.")] = "1,2",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after a warm-up.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The report; its rows go beside it as JSON.",
            show_default="scaling.html beside the recipe's runs, where `stoker report` finds it",
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Measure samples/s (or tokens/s), memory, waiting and communication by the number of ranks.

    Strong scaling keeps the global batch, weak scaling a rank's share of it. Every rank gets the
    same number of cores, however many there are. What is timed are steps alone: whatever a recipe
    does every so often (evaluation, checkpoints) is left out.
    """
    show_messages()
    found = recipes.load(recipe)
    output = output or (runs / found.name / report.NAME).with_suffix(".html")
    report.check(output)
    resolved = configs.resolve(found.config, overrides or (), None)
    counts = _counts(nproc)
    _check_length(found, resolved.config, steps)
    _share_cores(max(counts))
    rows = _measured(found, resolved, counts, steps, repeats)
    result = {
        "recipe": found.name, "config": resolved.values, "machine": _machine(),
        "torch": metadata.version("torch"), "stoker": metadata.version("stoker"),
        "cores_per_rank": int(os.environ["OMP_NUM_THREADS"]), "steps": steps, "repeats": repeats,
        "rows": rows,
    }  # fmt: skip
    rows_file = report.write(result, output)
    if json:
        print_json({**result, "report": str(output), "json": str(rows_file)})
        return 0
    _show(rows)
    console().print(f"\nreport {output}   rows {rows_file}")
    return 0


def run_rank(job: Job, steps: int) -> int:
    """What each rank does: train until it is measured."""
    os.environ["STOKER_SINKS"] = "none"
    train.run_rank(job, measure=steps)
    return 0


def _measured(
    recipe: Recipe, resolved: Resolved[Any], counts: Sequence[int], steps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each way of scaling and number of ranks; repeats go round, so that a slow moment hits all."""
    base = int(getattr(resolved.config, "batch_size", 0))
    if not base:
        raise BadInput(f"{recipe.name} has no batch_size to scale")
    least = min(counts)
    odd = next((n for n in counts if base * n % least), None)
    if odd is not None:
        raise BadInput(
            f"batch_size={base} on {least} ranks has no whole counterpart on {odd}: "
            f"make it a multiple of {least}"
        )
    ways = [("strong", n, base) for n in counts]
    ways += [("weak", n, base * n // least) for n in counts if n > least]
    for _, ranks, batch_size in ways:
        train.check_ranks(recipe, configs.changed(resolved, [f"batch_size={batch_size}"]).config, ranks)
    train.check(recipe, resolved.config, least)
    found: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(repeats):
        for way in ways:
            scale, ranks, batch_size = way
            log.info(
                "measuring %s scaling, %s, batch of %d, %d of %d",
                scale, counted(ranks, "rank"), batch_size, number + 1, repeats,
            )  # fmt: skip
            config = configs.changed(resolved, [f"batch_size={batch_size}"])
            found[way].append(_one(recipe, config, ranks, steps, batch_size))
    return summarised(found)


def _one(recipe: Recipe, resolved: Resolved[Any], ranks: int, steps: int, batch_size: int) -> dict[str, Any]:
    """One measurement, in ranks and a runs folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        name = directory.new_id()
        job = Job(
            recipe.reference, resolved.values, resolved.sources, Path(folder), "bench", name,
            profile=None, json=False, accept_drift=False,
        )  # fmt: skip
        local.run(run_rank, (job, steps), nproc=ranks, preload=recipe.preload)
        run = finding.locate(Path(folder), "bench", name)
        files = [run.logs / f"timing-rank-{rank}.json" for rank in range(ranks)]
        timed = [json_module.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
        layout = view.load(run).attempts[-1].layout if run.exists() else {}
    if len(timed) != ranks:
        raise BadInput(
            f"{recipe.name} ended before {timing_steps(steps)} steps, of which {steps} are measured: "
            "make its run longer, or --steps smaller"
        )
    seconds = max(t["seconds"] for t in timed) / steps
    return {
        "seconds": seconds, "rate": batch_size * timed[0]["units_per_sample"] / seconds,
        "unit": timed[0]["unit"], "peak_bytes": [int(t["peak_bytes"]) for t in timed],
        "parallel": layout.get("parallel"), "precision": layout.get("precision"),
        "waiting": max(t["waited"] for t in timed) / steps / seconds,
        "communication": max(t["communicated"] for t in timed),
    }  # fmt: skip


def summarised(found: Mapping[Way, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a way: medians over its repeats, the rates of all of them, efficiency and what limits it.

    Efficiency is the rate a rank over that of the fewest ranks.
    """
    least = min(ranks for _, ranks, _ in found)
    base = next(statistics.median(m["rate"] for m in ms) for (_, n, _), ms in found.items() if n == least)
    rows = []
    for (scale, ranks, batch_size), measured in found.items():
        rates = [m["rate"] for m in measured]
        first = measured[0]
        row = {
            "scaling": scale, "ranks": ranks, "batch_size": batch_size,
            "parallel": first["parallel"], "precision": first["precision"],
            "unit": first["unit"], "rate": statistics.median(rates), "rates": rates,
            **{key: statistics.median(m[key] for m in measured)
               for key in ("seconds", "waiting", "communication")},
            "peak_bytes": [max(peaks) for peaks in zip(*(m["peak_bytes"] for m in measured), strict=True)],
        }  # fmt: skip
        row["efficiency"] = row["rate"] / (base * ranks / least)
        row["cause"] = report.cause(row)
        rows.append(row)
    return rows


def _check_length(recipe: Recipe, config: Any, steps: int) -> None:
    """Raises BadInput where the config says that the run is shorter than what is measured."""
    length = getattr(config, "max_steps", None)
    needed = timing_steps(steps)
    if isinstance(length, Duration) and length.unit == "step" and length.count < needed:
        raise BadInput(
            f"max_steps={length}: {needed} steps are needed to measure {steps}, some before to warm up and "
            "some after to see communication; leave it out, or make --steps smaller"
        )


def timing_steps(steps: int) -> int:
    """How many steps a run must have for so many to be measured."""
    from stoker.engine import timing

    return timing.needed(steps)


def _machine() -> dict[str, Any]:
    known = machine.hardware()
    return {key: known[key] for key in ("system", "processor", "cores", "memory_bytes", "gpus")}


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"--nproc {text}: give numbers of ranks joined by commas, such as 1,2,4")
    return sorted({int(part) for part in parts})


def _share_cores(most: int) -> None:
    """The same cores a rank whatever their number, or fewer ranks would look slower than they are."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // most)))


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in report.headings(rows):
        table.add_column(heading, justify="left" if heading == "scaling" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row))
    console().print(table)
    for row in rows:
        if row["cause"]:
            console().print(f"{row['scaling']} scaling to {row['ranks']} ranks is poor: {row['cause']}")
