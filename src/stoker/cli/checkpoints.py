"""`stoker checkpoints list|verify|export|rm`: what a run can be resumed from, and its weights taken out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from stoker import storage
from stoker.checkpoint import manifest
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.runs.common import RunName
from stoker.errors import BadInput, nearest
from stoker.report import facts
from stoker.run import finding, mirror, opening, view
from stoker.run.journal import Event
from stoker.run.series import guess_goal
from stoker.run.view import RunView
from typer.core import TyperGroup


class _ListsByDefault(TyperGroup):
    """`stoker checkpoints RUN` is `stoker checkpoints list RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        named = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if named else ["list", *args])


app = typer.Typer(
    cls=_ListsByDefault, help="What a run can be resumed from; `stoker checkpoints RUN` lists it.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

Which = Annotated[str, typer.Argument(metavar="[WHICH]", help="last, best, or a step.")]
Metric = Annotated[str, typer.Option("--metric", help="What best goes by.")]
_KINDS = ("model", "adapter")


@app.command("list")
def list_(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """List a run's checkpoints, oldest first, without checking their content."""
    seen = view.load(finding.find(runs, run))
    rows = [_row(path) for path in manifest.folders(seen.directory.checkpoints)]
    if json:
        print_json({"checkpoints": rows})
    elif not rows:
        console().print(f"run {seen.directory.id} has no checkpoint", markup=False)
    else:
        _print(rows)


@app.command()
def verify(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> int:
    """Check every file of every checkpoint against its checksum; exit code 1 where one is damaged."""
    seen = view.load(finding.find(runs, run))
    mend = _mend(seen)
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
        typer.Option("-o", "--output", help="A new folder, or FILE.safetensors; by default RUN-step-N."),
    ] = None,
    metric: Metric = "val_loss",
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Write a checkpoint's weights: as the run exports its model (a Hugging Face folder), or one file."""
    seen = view.load(finding.find(runs, run))
    found = chosen(seen, which, metric)
    target = output or Path(f"{seen.directory.id}-{found.path.name}")
    if target.exists():
        raise BadInput(f"{target} is there already: name another with -o")
    from stoker.checkpoint import store

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        store.export_model(found, target)
    else:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            kind = exported(seen, None) or seen.artifacts.get("shape")
            if kind is not None:
                copy_exported(seen, kind, folder)
            put_weights(found, folder)
            folder.rename(target)
    if json:
        print_json({"checkpoint": _row(found.path), "output": str(target.absolute())})
    else:
        console().print(str(target), markup=False)


@app.command()
def rm(
    run: RunName,
    step: Annotated[int, typer.Argument(metavar="STEP", help="The step of the checkpoint.")],
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
    with opening.kept_from_training(seen.directory):
        copy = mirror.of(seen.directory)
        if copy is not None:
            copy.remove_checkpoint(path.name)
        manifest.remove(path)
    if json:
        print_json({"removed": str(path)})
    else:
        console().print(f"removed {path.name}", markup=False)


def chosen(seen: RunView, which: str, metric: str) -> manifest.Checkpoint:
    """The checkpoint that is meant, verified. Raises BadInput."""
    folder = seen.directory.checkpoints
    kept = {manifest.step_of(path): path for path in manifest.committed(folder)}
    if not kept:
        raise BadInput(f"run {seen.directory.id!r} has no checkpoint")
    if which == "best":
        path = _best(seen, metric)
    elif which == "last":
        path = kept[max(kept)]
    elif which.isdigit() and int(which) in kept:
        path = kept[int(which)]
    else:
        raise BadInput(
            f"no checkpoint {which!r}: give best, last, or one of the steps {', '.join(map(str, kept))}"
        )
    try:
        return manifest.mended(path, _mend(seen))
    except manifest.InvalidCheckpoint as error:
        raise BadInput(f"checkpoint {path.name} cannot be used: {error}") from error


def _mend(seen: RunView) -> Callable[[Path], None] | None:
    """Brings here what of a checkpoint is only in the object store that the run is in."""
    copy = mirror.of(seen.directory)
    return copy.fetch_checkpoint if copy is not None else None


def _best(seen: RunView, metric: str) -> Path:
    goal = seen.goals.get(metric) or guess_goal(metric)
    if goal is None:
        raise BadInput(f"nobody said which way {metric!r} is better: run.goal({metric}='min') or 'max' does")
    path = manifest.best(seen.directory.checkpoints, metric, goal)
    if path is None:
        raise BadInput(
            f"no checkpoint of run {seen.directory.id!r} knows {metric!r}; name another with --metric"
        )
    return path


def exported(seen: RunView, name: str | None) -> Event | None:
    """The artifact that is the run's model. Raises BadInput."""
    if name is not None and name not in seen.artifacts:
        known = nearest(name, seen.artifacts) or f"; it has: {', '.join(seen.artifacts) or 'none'}"
        raise BadInput(f"run {seen.directory.id!r} has no artifact {name!r}{known}")
    if name is not None:
        return seen.artifacts[name]
    models = [event for event in seen.artifacts.values() if event["kind"] in _KINDS]
    if len(models) > 1:
        names = ", ".join(event["name"] for event in models)
        raise BadInput(f"run {seen.directory.id!r} has several models: choose one with --artifact: {names}")
    return models[0] if models else None


def copy_exported(seen: RunView, artifact: Event, folder: Path) -> None:
    """Copy an artifact's files as they were recorded. Raises BadInput where they are not that any more."""
    base = seen.directory.path / artifact.get("path", f"artifacts/{artifact['name']}")
    for file in artifact["files"]:
        place = seen.directory.path / file["path"]
        if not place.is_file() or storage.sha256(place) != file["sha256"]:
            raise BadInput(f"{place} is gone, or is not what the run recorded: it cannot be registered")
        target = folder / (place.relative_to(base) if place != base else place.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place, target)


def put_weights(checkpoint: manifest.Checkpoint, folder: Path) -> None:
    """Put a checkpoint's weights in place of the exported ones, under the names that those have."""
    from safetensors.torch import load_file, save_file
    from stoker.checkpoint import store

    trained = load_file(store.export_model(checkpoint, folder / ".checkpoint.safetensors"))
    (folder / ".checkpoint.safetensors").unlink()
    exported = sorted(folder.rglob("*.safetensors"))
    plain = {name.replace(".default.", "."): t for name, t in trained.items()}  # PEFT's adapter name
    if not exported:
        adapter = (folder / "adapter_config.json").exists()
        file = folder / ("adapter_model.safetensors" if adapter else "model.safetensors")
        save_file(plain if adapter else trained, file, {"format": "pt"})
        file.chmod(0o644)
        return
    known = {name for file in exported for name in load_file(file)}
    lost, kept = sorted(plain.keys() - known), sorted(known - plain.keys())
    if lost and kept:  # only the first: weights that are tied; only the second: some that were not trained
        raise BadInput(
            f"the run exported its weights under other names than its checkpoint has ({kept[0]}; {lost[0]}): "
            "give -o FILE.safetensors for the checkpoint's own"
        )
    for file in exported:
        tensors = load_file(file)
        save_file({name: plain.get(name, old) for name, old in tensors.items()}, file, {"format": "pt"})
        file.chmod(0o644)


def _row(path: Path) -> dict[str, Any]:
    """A checkpoint as its manifest says."""
    row: dict[str, Any] = {"step": manifest.step_of(path), "path": str(path), "problem": None}
    try:
        found = manifest.read(path)
    except manifest.InvalidCheckpoint as reason:
        return {**row, "bytes": None, "samples": None, "metrics": {}, "problem": str(reason)}
    return {**row, "bytes": found.bytes, "samples": found.samples, "metrics": found.metrics}


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("step", "size", "loss", "val_loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        losses = [row["metrics"].get(name) for name in ("loss", "val_loss")]
        shown = [facts.number(loss) if loss is not None else "" for loss in losses]
        size = facts.size(row["bytes"]) if row["bytes"] is not None else ""
        table.add_row(str(row["step"]), size, *shown, row["problem"] or Path(row["path"]).name)
    console().print(table)
