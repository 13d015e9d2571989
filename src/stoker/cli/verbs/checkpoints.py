"""`stoker checkpoints list|verify|export|rm`: a run's checkpoints, and the export of their weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from stoker import exports, words
from stoker.checkpoint import manifest
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, answer, console, print_json
from stoker.cli.verbs.runs.common import RunName
from stoker.errors import BadInput, StokerError
from stoker.report import facts
from stoker.report.terminal import print_whole, table
from stoker.run import finding, mirror, opening, view
from stoker.run.state import RunView
from stoker.status import FINISHED
from typer.core import TyperGroup


class _ListsByDefault(TyperGroup):
    """`stoker checkpoints RUN` is `stoker checkpoints list RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        named = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if named else ["list", *args])


app = typer.Typer(
    cls=_ListsByDefault, help="A run's checkpoints; `stoker checkpoints RUN` lists them.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

Which = Annotated[str, typer.Argument(metavar="[WHICH]", help="last, best, or a step number.")]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="The metric that decides which is best.",
        show_default="that of the run's best checkpoint",
    ),
]


@app.command("list")
def list_(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """List a run's checkpoints, oldest first, and which is the best. Their content is not checked.

    A metric that was measured at an earlier step than the checkpoint's is shown with that step.
    """
    seen = view.load(finding.find(runs, run))
    best = _best(seen)
    rows = [
        {**row, "measured_at": _measured_at(seen, row), "best": Path(row["path"]) == best}
        for row in map(_row, manifest.folders(seen.directory.checkpoints))
    ]
    if json:
        print_json({"best_by": seen.best, "checkpoints": rows})
    elif not rows:
        console().print(f"run {seen.directory.id} has no checkpoint", markup=False)
    else:
        _print(rows, seen.best)


@app.command()
def verify(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> int:
    """Check every file of every checkpoint by its checksum. The exit code is 1 if one is damaged."""
    seen = view.load(finding.find(runs, run))
    mend = exports.mend(seen)
    rows = []
    for path in manifest.folders(seen.directory.checkpoints):
        try:
            manifest.mended(path, mend)
            row = _row(path)
        except manifest.InvalidCheckpoint as reason:
            row = {**_row(path), "problem": str(reason)}
        rows.append(row)
        if not json:
            console().print(f"{path.name}  {row['problem'] or 'ok'}", markup=False)
    if json:
        print_json({"checkpoints": rows})
    return int(any(row["problem"] for row in rows))


@app.command()
def export(
    run: RunName,
    which: Which = "last",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A new folder, or FILE.safetensors; default: RUN-step-N."),
    ] = None,
    metric: Metric = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Export a checkpoint's weights. The format is that of the run's own export, or one .safetensors file."""
    seen = view.load(finding.find(runs, run))
    target = output or Path(f"{seen.directory.id}-{exports.meant(seen, which, metric).name}")
    if target.exists():
        raise BadInput(f"{target} already exists: choose another name with -o")
    if target.suffix in _PICKLES:
        raise BadInput(
            f"{target}: no {target.suffix} file is written; give {target.with_suffix('.safetensors')} for "
            f"one file, or {target.with_suffix('')} for a folder in the format of the run's own export"
        )
    from stoker.checkpoint import store

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        found = exports.chosen(seen, which, metric)
        store.export_model(found, target)
    else:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            made = exports.make(seen, folder, which=which, metric=metric)
            assert made.checkpoint is not None, "a checkpoint was asked for"
            found = made.checkpoint
            folder.rename(target)
    answer(json, {"checkpoint": _row(found.path), "output": str(target.absolute())}, str(target))


@app.command()
def rm(
    run: RunName,
    step: Annotated[int, typer.Argument(metavar="STEP", help="The step of the checkpoint.")],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Also the only checkpoint of a run that has not finished.")
    ] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Delete a checkpoint."""
    seen = view.load(finding.find(runs, run))
    path = manifest.folder(seen.directory.checkpoints, step)
    if not path.is_dir():
        known = ", ".join(str(manifest.step_of(p)) for p in manifest.folders(seen.directory.checkpoints))
        raise BadInput(
            f"run {seen.directory.id!r} has no checkpoint of step {step}; it has {known or 'none'}"
        )
    if not yes and seen.status != FINISHED and manifest.committed(seen.directory.checkpoints) == [path]:
        raise BadInput(
            f"{path.name} is the only checkpoint of {seen.directory.id!r}, which has not finished: without "
            "it, nothing of its training is left. Add --yes to delete it"
        )
    with opening.kept_from_training(seen.directory):
        copy = mirror.of(seen.directory)
        if copy is not None:
            copy.remove_checkpoint(path.name)
        manifest.remove(path)
    if path.exists():
        raise StokerError(f"{path} is no longer a checkpoint, but some of its files could not be deleted")
    answer(json, {"removed": str(path)}, f"removed {path.name}")


def _best(seen: RunView) -> Path | None:
    """The best checkpoint; None if none has the metric that decides, or its goal is not known."""
    try:
        return exports.meant(seen, "best")
    except BadInput:
        return None


def _measured_at(seen: RunView, row: dict[str, Any]) -> dict[str, int]:
    """The step at which each metric of a checkpoint was measured."""
    found = {name: exports.measured_at(seen, name, row["step"]) for name in row["metrics"]}
    return {name: step for name, step in found.items() if step is not None}


def _row(path: Path) -> dict[str, Any]:
    """A checkpoint as its manifest says."""
    row: dict[str, Any] = {"step": manifest.step_of(path), "path": str(path), "problem": None}
    try:
        found = manifest.read(path)
    except manifest.InvalidCheckpoint as reason:
        return {**row, "bytes": None, "samples": None, "metrics": {}, "problem": str(reason)}
    return {**row, "bytes": found.bytes, "samples": found.samples, "metrics": found.metrics}


def _print(rows: list[dict[str, Any]], decides: str) -> None:
    shown = list(dict.fromkeys(["loss", "val_loss", decides]))
    numbers = ("step", "size", *shown)
    made = table([*numbers, ""], right=numbers)
    for row in rows:
        size = words.size(row["bytes"]) if row["bytes"] is not None else ""
        name = Path(row["path"]).name + (f", best by {decides}" if row["best"] else "")
        values = [_measured(row, metric) for metric in shown]
        made.add_row(str(row["step"]), size, *values, row["problem"] or name)
    print_whole(console(), made)


def _measured(row: dict[str, Any], metric: str) -> str:
    """A checkpoint's metric, with the step at which it was measured if that is an earlier one."""
    value, step = row["metrics"].get(metric), row["measured_at"].get(metric, row["step"])
    return facts.number(value) + (f" (step {step})" if value is not None and step != row["step"] else "")
