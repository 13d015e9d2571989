"""What is added to a run from outside, alive or not: events in a journal file of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoker.object_store import Unreachable
from stoker.run import journal, mirror
from stoker.run.directory import RunDirectory

log = logging.getLogger("stoker")


def add(run: RunDirectory, events: Mapping[str, Mapping[str, Any]]) -> None:
    """Append events, by type, to the journal of a run, also to that in its object store.

    If the store cannot be reached, a warning says so. Raises OSError if the journal here cannot be written.
    """
    writer = journal.control(run.journal)
    for kind, fields in events.items():
        writer.append(kind, **fields)
    writer.sync()
    writer.close()
    _upload(run, writer.file)


def _upload(run: RunDirectory, file: Path) -> None:
    """Upload a journal file to the run's object store, if it has one; a run in training has an uploader."""
    copy = mirror.of(run)
    if copy is None or run.trained_here:
        return
    try:
        copy.push_addition(file)
    except (Unreachable, OSError) as error:
        log.warning("%s; the change to run %s is known only on this machine", error, run.id)
