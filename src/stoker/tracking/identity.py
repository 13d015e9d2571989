"""The identity of a run in a sink: its place in the runs folder, and the uid of its record.

A copy of a run's directory has the same uid, ledgers and record as the original, so the place distinguishes
them. A renamed run keeps its run in the sink. Names that a sink does not accept stay distinct here, too.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

from stoker.errors import BadInput
from stoker.run.directory import RunDirectory


def of(directory: RunDirectory) -> str:
    """The present identity of a run."""
    return f"{directory.name}@{directory.record()['uid']}"


def recorded(record: dict[str, Any]) -> str:
    """The identity of a run when its record was written."""
    return f"{record['experiment']}/{record['id']}@{record['uid']}"


def marked(cleaned: str, original: str) -> str:
    """A name that was made acceptable to a sink, distinct from others that are cleaned to the same."""
    return f"{cleaned}-{hashlib.sha256(original.encode()).hexdigest()[:6]}"


def is_anothers(identity: str, directory: RunDirectory) -> bool:
    """Whether the identity is that of another run in the same runs folder, which this run is a copy of."""
    place, _, uid = identity.rpartition("@")
    other = RunDirectory(directory.path.absolute().parent.parent / place)
    if other.path == directory.path.absolute():
        return False
    with contextlib.suppress(BadInput):  # there is no such run, or its record is unreadable
        return bool(other.record().get("uid") == uid)
    return False
