"""`stoker models register|list|show|promote|pull`: named versions of what runs made, in MLflow's registry."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from stoker.checkpoint import manifest
from stoker.cli import checkpoints
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.runs.common import RunName, iso
from stoker.errors import BadInput, nearest
from stoker.report import facts
from stoker.report.terminal import when
from stoker.run import finding, view
from stoker.run.view import RunView
from stoker.tracking.registry import STAGES, Registry, Version, write_checksums

if TYPE_CHECKING:
    from stoker.tracking.registry import Stage

app = typer.Typer(help="Named versions of what runs made, in MLflow's registry.", no_args_is_help=True)

Reference = Annotated[
    str, typer.Argument(metavar="NAME@VERSION", help="NAME@3, NAME@production, or NAME for the newest.")
]


@app.command()
def register(
    run: RunName,
    name: Annotated[str, typer.Option("--name", help="What the model is called.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="WHICH",
            help="best (by val_loss), last, or a step; by default the final export.",
        ),
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="What --checkpoint best goes by.")] = "val_loss",
    artifact: Annotated[
        str | None, typer.Option("--artifact", help="Which artifact; by default the run's model or adapter.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Make what a run exported the next version of a model, with its lineage."""
    seen = view.load(finding.find(runs, run))
    exported = checkpoints.exported(seen, artifact)
    chosen = checkpoints.chosen(seen, checkpoint, metric) if checkpoint else None
    if exported is None and chosen is None:
        raise BadInput(
            f"run {seen.directory.id!r} has exported no model yet; give --checkpoint last or --artifact"
        )
    kind = str(exported["kind"]) if exported else "model"
    with tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        if exported is not None:
            checkpoints.copy_exported(seen, exported, folder)
        if chosen is not None:
            checkpoints.put_weights(chosen, folder)
        write_checksums(folder)
        made = Registry(runs).register(seen, name, folder, kind=kind, about=_about(seen, chosen))
    _answer(made, json, f"registered {made.name}@{made.version} from {made.run}")


@app.command("list")
def list_(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One model's versions.", show_default=False)
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """List the registered models and their versions, the newest first."""
    registry = Registry(runs)
    found = registry.versions(name) if name else registry.models()
    if json:
        print_json({"models": [_entry(version) for version in found]})
    elif not found:
        console().print("no model is registered yet: stoker models register RUN --name NAME", markup=False)
    else:
        _print_list(found)


@app.command()
def show(version: Reference, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Show a version: its stage, and the run, code, data and metrics that it comes from."""
    found = Registry(runs).version(version)
    if json:
        print_json(_entry(found))
        return
    out = console()
    out.print(
        Text.assemble((f"{found.name}@{found.version}", "bold"), "  ", (found.stage or "no stage", "green"))
    )
    shown = {"aliases": ", ".join(found.aliases), **found.lineage, "source": found.source}
    width = max(map(len, shown)) + 2
    for key, value in shown.items():
        out.print(Text.assemble((f"  {key:{width}}", "dim"), value), soft_wrap=True)


@app.command()
def promote(
    version: Reference,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="staging, production or archived.")],
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Give a version a stage; the one that was in staging or production before is archived."""
    chosen: Stage | None = next((known for known in STAGES if known == stage), None)
    if chosen is None:
        raise BadInput(f"{stage!r} is no stage{nearest(stage, STAGES)}; give {', '.join(STAGES)}")
    made = Registry(runs).promote(version, chosen)
    _answer(made, json, f"{made.name}@{made.version} is {made.stage} now")


@app.command()
def pull(
    version: Reference,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder; by default NAME-VERSION here.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Copy a version's files to a folder, each checked."""
    registry = Registry(runs)
    found = registry.version(version)
    target = registry.pull(f"{found.name}@{found.version}", output or Path(f"{found.name}-{found.version}"))
    if json:
        print_json({**_entry(found), "folder": str(target.absolute())})
    else:
        console().print(str(target), markup=False)


def _about(seen: RunView, checkpoint: manifest.Checkpoint | None) -> dict[str, str]:
    """What a version is: at which step, by which command, and what its metrics were there."""
    metrics = seen.newest() if checkpoint is None else checkpoint.metrics
    return {
        "command": facts.command(seen),
        "step": str(seen.step if checkpoint is None else checkpoint.step),
        "from_checkpoint": str(checkpoint is not None).lower(),
        **{f"metric.{name}": repr(value) for name, value in metrics.items()},
    }


def _answer(version: Version, json: bool, said: str) -> None:
    if json:
        print_json(_entry(version))
    else:
        console().print(said, markup=False)


def _entry(version: Version) -> dict[str, Any]:
    return {**vars(version), "created": iso(version.created)}


def _print_list(versions: list[Version]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("model", "stage", "run", "val_loss", "registered"):
        table.add_column(heading, no_wrap=True)
    now = datetime.now().astimezone()
    for version in versions:
        loss = version.lineage.get("metric.val_loss")
        table.add_row(
            f"{version.name}@{version.version}", version.stage, version.run,
            facts.number(float(loss)) if loss else "", when(version.created, now),
        )  # fmt: skip
    console().print(table)
