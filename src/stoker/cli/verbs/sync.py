"""`stoker sync RUN`: ship pending events to the sinks, or rebuild the run in them."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Annotated

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.errors import BadInput, StokerError
from stoker.run import finding, lease, mirror, uploader
from stoker.run.directory import RunDirectory
from stoker.tracking import follower
from stoker.tracking.follower import SinkState
from stoker.tracking.sinks import enabled, say_what_is_disabled


def sync(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run's id, the start of one, experiment/id, or its path."),
    ],
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Create the run anew in every tracker, and mark the old one as replaced."
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option("--again", help="Upload a run anew that another machine deleted in the object store."),
    ] = False,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Ship what trackers and object store lack. The command waits until it has arrived.

    MLflow is the server that MLFLOW_TRACKING_URI names, else the store in the runs folder.

    With --rebuild, the run is created anew in every tracker, without the points that a resumed attempt
    replaced, even if it or its experiment was deleted in MLflow. The old one is marked as replaced.
    """
    found = finding.find(runs, run, deleted=True)
    if mirror.is_deleted(found):
        _restore(found, again)
    copied = _upload(found)
    if not enabled() and (rebuild or not copied):
        say_what_is_disabled()
        raise BadInput("STOKER_SINKS turns off every sink: set it to those to ship this run to")
    replaced = follower.rebuild(found) if rebuild else {}
    before = {sink.name: sink.pending for sink in follower.state(found)}
    code = _ship(found)
    sinks = follower.state(found)
    if code != 0:
        raise StokerError(_explain(found, sinks))
    _refuse_void(found)
    if json:
        print_json({"run": str(found.path), "sinks": [_answer(sink, before, replaced) for sink in sinks]})
    else:
        for sink in sinks:
            shipped = max(before[sink.name] - sink.pending, 0)
            console().print(
                f"{sink.name}: {_anew(sink.name, replaced)}{shipped} events shipped to {sink.where}",
                markup=False,
            )
        if copied and not found.trained_here:
            console().print(f"{found.id}: all of it is in {finding.shown(runs)}", markup=False)


def _restore(found: RunDirectory, again: bool) -> None:
    if not again:
        raise BadInput(
            f"run {found.id!r} was deleted in {finding.shown(found.runs)}: to upload it again "
            f"from {found.path}, add --again; otherwise delete that folder"
        )
    mirror.restore(found)


def _upload(found: RunDirectory) -> bool:
    """Upload a run to its object store; returns whether it has one. Raises StokerError.

    A run that is being trained here has its own uploader. Of a run that another machine trained last, the
    store has all that counts, and this machine has downloaded it. A machine that trains a run also ships it
    to the sinks.
    """
    copy = mirror.of(found)
    if copy is None:
        return False
    if found.trained_here:
        return True
    host = lease.held_elsewhere(found.path)
    if host:
        raise StokerError(f"{host} is training {copy.where} now, and ships it to its trackers itself")
    if not copy.taken_elsewhere():
        said = uploader.wait(found, lambda: uploader.ONCE_PATIENCE)
        if said.behind:
            raise StokerError(f"{copy.where} does not have all of this run yet: {said.error}")
    return True


def _refuse_void(found: RunDirectory) -> None:
    """Raise StokerError if another machine continued the run without something that was trained here."""
    copy = mirror.of(found)
    void = sorted(found.journal.glob("*.void-*"))
    if copy is not None and void and copy.taken_elsewhere():
        raise StokerError(
            f"{copy.where} lacks what this machine trained before another one continued the run without it; "
            f"it is void, and kept in {', '.join(map(str, void))}: delete that if it is not needed"
        )


def _ship(found: RunDirectory) -> int:
    """Run a follower to its end; it waits for a running one and never outlives this command."""
    process = follower.spawn(found, once=True)
    try:
        return process.wait()
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _answer(sink: SinkState, before: dict[str, int], replaced: dict[str, str | None]) -> dict[str, object]:
    anew = {"rebuilt": sink.name in replaced, "replaced": replaced.get(sink.name)}
    return {**vars(sink), "shipped": max(before[sink.name] - sink.pending, 0), **anew}


def _anew(sink: str, replaced: dict[str, str | None]) -> str:
    if sink not in replaced:
        return ""
    before = replaced[sink]
    return f"created anew, replacing {before}: " if before else "created anew: "


def _explain(found: RunDirectory, sinks: list[SinkState]) -> str:
    unknown = f"it has not answered; see {found.logs / 'follower.log'}"
    failing = [f"{sink.name} ({sink.where}) lacks {sink.pending} events: {sink.error or unknown}"
               for sink in sinks if sink.pending]  # fmt: skip
    return "; ".join(failing) or f"the follower failed: see {found.logs / 'follower.log'}"
