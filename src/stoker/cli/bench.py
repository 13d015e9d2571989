"""`stoker bench scaling RECIPE`: throughput, memory and waiting by the number of ranks."""

from __future__ import annotations

import json as json_module
import logging
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from stoker import config as configs
from stoker import recipes
from stoker.cli import train
from stoker.cli.output import Json, console, print_json
from stoker.cli.train import Job, Overrides
from stoker.config import Resolved
from stoker.errors import BadInput
from stoker.launch import local
from stoker.recipes import Recipe
from stoker.report import scaling as report
from stoker.run import directory

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
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The report; its rows go beside it as JSON."),
    ] = Path("scaling.html"),
    json: Json = False,
) -> int:
    """Measure samples/s (or tokens/s), memory, waiting and communication by the number of ranks.

    Strong scaling keeps the global batch, weak scaling a rank's share of it. Every rank gets the
    same number of cores, however many there are.
    """
    found = recipes.load(recipe)
    resolved = configs.resolve(found.config, overrides or (), None)
    counts = _counts(nproc)
    _share_cores(max(counts))
    rows = _measured(found, resolved, counts, steps, repeats)
    rows_file = report.write(found.name, rows, output)
    if json:
        print_json({"recipe": found.name, "rows": rows, "report": str(output), "json": str(rows_file)})
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
    ways = [("strong", n, base) for n in counts] + [("weak", n, base * n) for n in counts if n > 1]
    for _, ranks, batch_size in ways:
        train.check(recipe, configs.changed(resolved, [f"batch_size={batch_size}"]).config, ranks)
    found: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(repeats):
        for way in ways:
            scale, ranks, batch_size = way
            log.info("%s scaling, %d ranks, %d of %d", scale, ranks, number + 1, repeats)
            config = configs.changed(resolved, [f"batch_size={batch_size}"])
            found[way].append(_one(recipe, config, ranks, steps, batch_size))
    return _rows(found, counts)


def _one(recipe: Recipe, resolved: Resolved[Any], ranks: int, steps: int, batch_size: int) -> dict[str, Any]:
    """One measurement, in ranks and a runs folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        name = directory.new_id()
        job = Job(
            recipe.reference,
            resolved.values,
            resolved.sources,
            Path(folder),
            "bench",
            name,
            None,
            False,
            False,
        )
        local.run(run_rank, (job, steps), nproc=ranks, preload=recipe.preload)
        files = sorted((Path(folder) / "bench" / name / "logs").glob("timing-rank-*.json"))
        timed = [json_module.loads(file.read_text(encoding="utf-8")) for file in files]
    if len(timed) != ranks:
        raise BadInput(
            f"{recipe.name} ended before {steps} steps were measured: make its run longer, or --steps smaller"
        )
    seconds = max(t["seconds"] for t in timed) / steps
    return {
        "seconds": seconds, "rate": batch_size * timed[0]["units_per_sample"] / seconds,
        "unit": timed[0]["unit"], "peak_bytes": max(t["peak_bytes"] for t in timed),
        "waiting": max(t["waited"] for t in timed) / steps / seconds,
        "communication": max(t["communicated"] for t in timed),
    }  # fmt: skip


def _rows(
    found: Mapping[tuple[str, int, int], list[dict[str, Any]]], counts: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    least = min(counts)
    single = statistics.median(m["rate"] for (_, n, _), ms in found.items() if n == least for m in ms)
    for (scale, ranks, batch_size), measured in found.items():
        rates = [m["rate"] for m in measured]
        row = {
            "scaling": scale, "ranks": ranks, "batch_size": batch_size, "unit": measured[0]["unit"],
            "rate": statistics.median(rates), "rate_spread": [min(rates), max(rates)],
            **{
                key: statistics.median(m[key] for m in measured)
                for key in ("seconds", "peak_bytes", "waiting", "communication")
            },
        }  # fmt: skip
        row["efficiency"] = row["rate"] / (single * ranks / least)
        row["cause"] = report.cause(row)
        rows.append(row)
    return rows


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"--nproc {text}: give numbers of ranks joined by commas, such as 1,2,4")
    return sorted({int(part) for part in parts})


def _share_cores(most: int) -> None:
    """The same cores a rank whatever their number, or fewer ranks would look slower than they are."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // most)))


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in report.HEADINGS:
        table.add_column(heading, justify="left" if heading == "scaling" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row))
    console().print(table)
    for row in rows:
        if row["cause"]:
            console().print(f"{row['scaling']} scaling to {row['ranks']} ranks is poor: {row['cause']}")
