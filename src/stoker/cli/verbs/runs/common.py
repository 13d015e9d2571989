"""What the verbs of `stoker runs` share: their RUN arguments, and a run as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from stoker.report.terminal import Listed
from stoker.run import reading
from stoker.run.directory import RunDirectory

RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, the start of one, experiment/id, or its path."),
]
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Runs: an id, the start of one, experiment/id, or a path."),
]
RunsMeant = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Runs: an id, the start of one, experiment/id, or a path; or an experiment, for all its runs.",
    ),
]


def listed(run: RunDirectory) -> Listed:
    return Listed(run, *reading.tolerantly(run))


def started(run: Listed) -> tuple[float, str]:
    started = run.view.started if run.view else run.directory.path.stat().st_mtime
    return started, run.directory.id


def entry(run: Listed) -> dict[str, Any]:
    """A listed run as JSON."""
    where = {"id": run.directory.id, "experiment": run.directory.experiment,
             "path": str(run.directory.path.absolute()), "status": run.status}  # fmt: skip
    if run.view is None:
        return {**where, "error": run.error, "step": None, "total_steps": None, "metrics": {},
                "started": None, "seconds": None}  # fmt: skip
    return {
        **where,
        "step": run.view.step,
        "total_steps": run.view.total_steps,
        "metrics": run.view.newest(),
        "started": iso(run.view.started),
        "seconds": run.view.seconds,
    }


def iso(seconds: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else None
