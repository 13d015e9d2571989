"""`stoker report RUN...`: one self-contained HTML file about one or more runs, or about a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from stoker import storage
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, answer
from stoker.errors import BadInput
from stoker.report import html, scaling
from stoker.run import finding, view
from stoker.run.directory import BEST
from stoker.tune import record


def report(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="One sweep, by name or path; or runs, each by id, the start of its id, experiment/id, or "
            "path. For several sweeps give the best trial of each.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file to write.",
            show_default="report.html in the run's artifacts or the sweep's folder, or here for several runs",
        ),
    ] = None,
    scaled: Annotated[
        Path | None,
        typer.Option(
            "--scaling",
            metavar="FILE",
            help="The JSON file that `stoker bench scaling` wrote.",
            show_default="scaling.json next to the runs, if there is one",
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Write an HTML report of a run, several runs or a sweep. It is one file, which opens offline."""
    if len(run) == 1 and (sweep := _sweep(runs, run[0])) is not None:
        _say(_of_sweep(sweep, output or sweep / "report.html"), [str(sweep)], json=json)
        return
    _refuse_sweeps(runs, run)
    found = {found.path.resolve(): found for found in (finding.find(runs, name) for name in run)}
    views = [view.load(directory_) for directory_ in found.values()]
    default = views[0].directory.artifacts / "report.html" if len(views) == 1 else Path("report.html")
    measured = [scaling.load(scaled)] if scaled is not None else scaling.measured(views)
    file = html.write(views, output or default, measured)
    _say(file, [str(seen.directory.path) for seen in views], json=json)


def _say(file: Path, about: list[str], *, json: bool) -> None:
    file = file.absolute()
    answer(json, {"report": str(file), "runs": about, "bytes": file.stat().st_size}, str(file))


def _refuse_sweeps(runs: Path, names: list[str]) -> None:
    """Refuse a sweep among several arguments. Raises BadInput."""
    trials = [_best_trial(folder) if (folder := _sweep(runs, name)) else name for name in names]
    if trials != names:
        raise BadInput(
            "a report is of one sweep, or of one or more runs; of the best trials: "
            f"stoker report {' '.join(trials)}, or stoker runs compare {' '.join(trials)}"
        )


def _best_trial(folder: Path) -> str:
    """The name of a sweep's best trial, as far as it has one."""
    return f"{folder.name}/{storage.read_json(folder / BEST).get('run', 'TRIAL')}"


def _sweep(runs: Path, name: str) -> Path | None:
    """The folder of the sweep with this name or path; None if there is none."""
    return next((folder for folder in (runs / name, Path(name)) if record.is_sweep(folder)), None)


def _of_sweep(folder: Path, output: Path) -> Path:
    from stoker.report import sweep
    from stoker.tune import study

    return sweep.write(study.of(folder), record.read(folder), folder.name, output)
