"""`stoker bench scaling RECIPE`: throughput, memory use and waiting time for each number of ranks."""

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
from stoker import config as configs
from stoker import machine, recipes
from stoker.cli import training
from stoker.cli.options import Overrides
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json, show_messages
from stoker.cli.training import RankJob
from stoker.config import Resolved
from stoker.duration import Duration
from stoker.errors import BadInput
from stoker.launch import local
from stoker.recipes import Recipe
from stoker.report import scaling as report
from stoker.report.terminal import print_whole, table
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
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a recipe file.")],
    overrides: Overrides = None,
    nproc: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks to measure.")] = "1,2",
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after a warm-up.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each configuration.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The report to write; its rows are written next to it as JSON.",
            show_default="scaling.html next to the recipe's runs, where `stoker report` finds it",
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Measure throughput and memory for each number of ranks. Waiting and communication are measured too.

    Strong scaling keeps the global batch size, weak scaling the batch size per rank. Every rank gets the
    same number of cores, however many ranks there are. Only steps are timed: periodic work (evaluation,
    checkpoints) is left out.
    """
    show_messages()
    found = recipes.load(recipe)
    output = output or (runs / found.name / report.NAME).with_suffix(".html")
    report.check(output)
    resolved = configs.resolve(found.config, overrides or (), None)
    counts = _counts(nproc)
    _check_length(resolved.config, steps)
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


def run_rank(job: RankJob, steps: int) -> int:
    """Train on one rank until the timed steps are done."""
    os.environ["STOKER_SINKS"] = "none"
    training.run_rank(job, measure=steps)
    return 0


def _measured(
    recipe: Recipe, resolved: Resolved[Any], counts: Sequence[int], steps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each kind of scaling and number of ranks; repeats are interleaved to spread slow moments."""
    base = int(getattr(resolved.config, "batch_size", 0))
    if not base:
        raise BadInput(f"{recipe.name} cannot be measured: it has no key batch_size to scale")
    least = min(counts)
    odd = next((n for n in counts if base * n % least), None)
    if odd is not None:
        raise BadInput(
            f"batch_size={base} on {least} ranks cannot be scaled to {odd} ranks: "
            f"make it a multiple of {least}"
        )
    ways = [("strong", n, base) for n in counts]
    ways += [("weak", n, base * n // least) for n in counts if n > least]
    for _, ranks, batch_size in ways:
        training.check_ranks(recipe, configs.changed(resolved, [f"batch_size={batch_size}"]).config, ranks)
    training.check(recipe, resolved.config, least)
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
    """One measurement, with its own ranks and runs folder."""
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        name = directory.new_id()
        job = RankJob(
            recipe=recipe.reference,
            values=resolved.values,
            sources=resolved.sources,
            runs=Path(folder),
            experiment="bench",
            name=name,
            profile=None,
            json=False,
            accept_drift=False,
        )
        local.run(run_rank, (job, steps), nproc=ranks, preload=recipe.preload)
        run = finding.locate(Path(folder), "bench", name)
        files = [run.logs / f"timing-rank-{rank}.json" for rank in range(ranks)]
        timed = [json_module.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
        layout = view.load(run).attempts[-1].layout if run.exists() else {}
    if len(timed) != ranks:
        raise BadInput(
            f"{recipe.name} ended before step {timing_steps(steps)}, which timing {steps} steps needs: "
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
    """One row per configuration: medians over its repeats, all rates, efficiency and what limits it.

    Efficiency is the rate per rank, relative to that of the smallest number of ranks.
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


def _check_length(config: Any, steps: int) -> None:
    """Raises BadInput if the config makes the run shorter than the measurement."""
    length = getattr(config, "max_steps", None)
    needed = timing_steps(steps)
    if isinstance(length, Duration) and length.unit == "step" and length.count < needed:
        raise BadInput(
            f"max_steps={length} is too short: timing {steps} steps takes {needed}, including warm-up before "
            "and communication steps after; leave max_steps out, or make --steps smaller"
        )


def timing_steps(steps: int) -> int:
    """How many steps a run needs so that `steps` can be timed."""
    from stoker.engine import timing

    return timing.needed(steps)


def _machine() -> dict[str, Any]:
    known = machine.hardware()
    return {key: known[key] for key in ("system", "processor", "cores", "memory_bytes", "gpus")}


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"--nproc {text}: give numbers of ranks separated by commas, such as 1,2,4")
    return sorted({int(part) for part in parts})


def _share_cores(most: int) -> None:
    """Give each rank the same number of cores in every measurement; otherwise they cannot be compared."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // most)))


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    headings = report.headings(rows)
    made = table(headings, right=set(headings) - {"scaling"})
    for row in rows:
        made.add_row(*report.cells(row))
    print_whole(console(), made)
    for row in rows:
        if row["cause"]:
            console().print(f"{row['scaling']} scaling to {row['ranks']} ranks is poor: {row['cause']}")
