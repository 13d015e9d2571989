"""`stoker report RUN...`: one self-contained HTML file about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.report import html, scaling
from stoker.run import finding, view


def report(
    run: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs: an id, the start of one, experiment/id, or a path."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file to write.",
            show_default="report.html in the run's artifacts, or here for several runs",
        ),
    ] = None,
    scaled: Annotated[
        Path | None,
        typer.Option(
            "--scaling",
            metavar="FILE",
            help="What `stoker bench scaling` wrote.",
            show_default="scaling.json beside the runs, where there is one",
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Write one HTML file about a run, or one that compares several; it opens offline."""
    found = {found.path.resolve(): found for found in (finding.find(runs, name) for name in run)}
    views = [view.load(directory_) for directory_ in found.values()]
    default = views[0].directory.artifacts / "report.html" if len(views) == 1 else Path("report.html")
    measured = [scaling.load(scaled)] if scaled is not None else scaling.measured(views)
    file = html.write(views, output or default, measured).absolute()
    if json:
        about = [str(seen.directory.path) for seen in views]
        print_json({"report": str(file), "runs": about, "bytes": file.stat().st_size})
    else:
        console().print(str(file), markup=False)
