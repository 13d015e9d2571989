"""What the verbs of `stoker runs` share: the runs that are meant, and one of them as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from stoker.errors import StokerError
from stoker.report.terminal import Listed
from stoker.run import view
from stoker.run.directory import RunDirectory

RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, the start of one, experiment/id, or its path."),
]
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Runs: an id, the start of one, experiment/id, or a path."),
]


def listed(run: RunDirectory) -> Listed:
    try:
        return Listed(run, view.load(run))
    except (StokerError, OSError, LookupError, TypeError, ValueError) as error:
        # Whatever is wrong with one run, the others are still listed.
        reason = str(error) if isinstance(error, StokerError) else f"{run.path}: {error!r}"
        return Listed(run, None, reason)


def started(run: Listed) -> tuple[float, str]:
    started = run.view.started if run.view else run.directory.path.stat().st_mtime
    return started, run.directory.id


def entry(run: Listed) -> dict[str, Any]:
    """A run of the list as JSON."""
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
