"""`stoker runs tag RUN key=value`: set the tags and add to the notes of a run, at any time."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import RunName
from stoker.errors import BadInput, nearest
from stoker.run import additions, finding, view
from stoker.run.directory import RunDirectory


def tag(
    run: RunName,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Tags to set.", show_default=False)
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="KEY", help="A tag to remove; repeatable.")
    ] = None,
    note: Annotated[str | None, typer.Option("--note", metavar="TEXT", help="A note to add.")] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> None:
    """Set or remove tags of a run, or add a note. With neither, show them. The run may be training."""
    found = finding.find(runs, run)
    changes = _changes(found, tags or [], remove or [])
    if changes or note:
        _write(found, changes, note)
    seen = view.load(found)
    if json:
        notes = [text for _, text in seen.notes]
        print_json({"run": str(found.path), "tags": seen.tags, "notes": notes})
        return
    for key, value in seen.tags.items():
        console().print(f"{key}={value}", markup=False)
    for _, text in seen.notes:
        console().print(text, markup=False)


def _changes(run: RunDirectory, tags: list[str], remove: list[str]) -> dict[str, str | None]:
    """The tags to set, with None for those to remove. Raises BadInput."""
    known = view.load(run).tags if remove else {}
    changes: dict[str, str | None] = {}
    for key in remove:
        if key not in known:
            raise BadInput(f"run {run.id!r} has no tag {key!r}{nearest(key, known)}")
        changes[key] = None
    for given in tags:
        key, equals, value = given.partition("=")
        if not equals or not key or not key.isprintable():
            raise BadInput(f"{given!r} is not a tag: write key=value")
        changes[key] = value
    return changes


def _write(run: RunDirectory, changes: dict[str, str | None], note: str | None) -> None:
    """Add the changes to the run; have them shipped to the sinks."""
    from stoker.tracking import follower, sinks

    events: dict[str, dict[str, Any]] = {}
    if changes:  # they come after what the run has set, though another machine's clock may be ahead
        written = max((attempt.last_event for attempt in view.load(run).attempts), default=0.0)
        events["tags"] = {"tags": changes, "time": max(time.time(), written)}
    if note:
        events["note"] = {"text": note}
    try:
        additions.add(run, events)
    except OSError as error:
        raise BadInput(f"{run.journal} cannot be written: {error.strerror}") from error
    if sinks.enabled() and not run.alive:  # a run in training has its own follower
        follower.spawn(run, once=True)
