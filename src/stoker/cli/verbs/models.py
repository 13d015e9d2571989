"""`stoker models register|list|show|promote|pull|push`: models in MLflow's registry, and sharing."""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text
from stoker import exports, storage
from stoker.checkpoint import manifest
from stoker.cli import sharing
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, answer, console, print_json, show_messages
from stoker.cli.verbs.checkpoints import Metric
from stoker.cli.verbs.runs.common import RunName, iso
from stoker.errors import BadInput, nearest
from stoker.report import commands, facts
from stoker.report.terminal import print_whole, table, when
from stoker.run import finding, view
from stoker.run.state import RunView
from stoker.tracking.registry import STAGES, Registry, Version, write_checksums

if TYPE_CHECKING:
    from stoker.tracking.registry import Stage

app = typer.Typer(help="Register models in MLflow's registry, and share them.", no_args_is_help=True)

Reference = Annotated[
    str, typer.Argument(metavar="NAME@VERSION", help="NAME@3, NAME@production, or NAME for the newest.")
]
OfCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="WHICH",
        help="best, last, or a step number; default: the final export.",
    ),
]
OfArtifact = Annotated[
    str | None, typer.Option("--artifact", help="The artifact; default: the run's model or adapter.")
]


@app.command()
def register(
    run: RunName,
    name: Annotated[str, typer.Option("--name", help="The name of the model.")],
    checkpoint: OfCheckpoint = None,
    metric: Metric = None,
    artifact: OfArtifact = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Register a run's export as the next version of a model. Its lineage is recorded."""
    seen = view.load(finding.find(runs, run))
    with tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        found = exports.make(seen, folder, which=checkpoint, metric=metric, artifact=artifact)
        write_checksums(folder)
        about = _about(seen, found.checkpoint)
        made = Registry(runs).register(seen, name, folder, kind=found.kind, about=about)
    _answer(made, json, f"registered {made.name}@{made.version} from {made.run}")


@app.command("list")
def list_(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="List only this model's versions.", show_default=False),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """List the registered models and their versions, newest first."""
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
    """Show a version: its stage, and its run, code, data and metrics."""
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
    """Give a version a stage. The version previously in staging or production is archived."""
    chosen: Stage | None = next((known for known in STAGES if known == stage), None)
    if chosen is None:
        raise BadInput(f"{stage!r} is not a stage{nearest(stage, STAGES)}; give one of {', '.join(STAGES)}")
    made = Registry(runs).promote(version, chosen)
    _answer(made, json, f"{made.name}@{made.version} is now {made.stage}")


@app.command()
def pull(
    version: Reference,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder; default: NAME-VERSION.")
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Copy a version's files to a folder and verify each one."""
    registry = Registry(runs)
    found = registry.version(version)
    target = registry.pull(f"{found.name}@{found.version}", output or Path(f"{found.name}-{found.version}"))
    answer(json, {**_entry(found), "folder": str(target.absolute())}, str(target))


@app.command()
def push(
    run: RunName,
    to: Annotated[
        str, typer.Argument(metavar="DEST", help="hub:org/name, s3://bucket/folder, or a new local folder.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base model.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Where others find the adapter's base model: a hub id or a folder.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Write weights in this precision; default: unchanged."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new hub repository public.")] = False,
    checkpoint: OfCheckpoint = None,
    metric: Metric = None,
    artifact: OfArtifact = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Share a run's model with a model card. Its files load with transformers and peft."""
    show_messages()
    seen = view.load(finding.find(runs, run))
    destination = sharing.destination(to, private=not public)
    with tempfile.TemporaryDirectory(prefix="stoker-model-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        found = exports.make(seen, folder, which=checkpoint, metric=metric, artifact=artifact)
        ready = sharing.prepare(
            seen, found, Path(scratch) / "merged", name=destination.name, revision=destination.revision,
            merge=merge, base=base,
        )  # fmt: skip
        if dtype is not None:
            exports.cast(ready, dtype)
        where = destination.send(ready)
        files = [str(file.relative_to(ready)) for file in storage.files_under(ready)]
    answer(json, {"run": seen.directory.name, "to": where, "files": files}, where)


def _about(seen: RunView, checkpoint: manifest.Checkpoint | None) -> dict[str, str]:
    """A version's command, step and metrics."""
    metrics = seen.newest() if checkpoint is None else checkpoint.metrics
    step = seen.step if checkpoint is None else checkpoint.step
    return {
        "command": "\n".join(commands.of(seen, step)),
        "step": str(step),
        "from_checkpoint": str(checkpoint is not None).lower(),
        **{f"metric.{name}": repr(value) for name, value in metrics.items()},
    }


def _answer(version: Version, json: bool, said: str) -> None:
    answer(json, _entry(version), said)


def _entry(version: Version) -> dict[str, Any]:
    return {**vars(version), "created": iso(version.created)}


def _print_list(versions: list[Version]) -> None:
    made = table(("model", "stage", "run", "val_loss", "registered"))
    now = datetime.now().astimezone()
    for version in versions:
        loss = version.lineage.get("metric.val_loss")
        made.add_row(
            f"{version.name}@{version.version}", version.stage, version.run,
            facts.number(float(loss)) if loss else "", when(version.created, now),
        )  # fmt: skip
    print_whole(console(), made)
