"""Who a run is to a sink: its place in the runs folder, with the uid of its record.

A copy of a run's directory has the uid, the ledgers and the record of the run that it was
copied from, so the place tells them apart. A run that was renamed is still who it was.
"""

from __future__ import annotations

import contextlib
from typing import Any

from stoker.errors import BadInput
from stoker.run.directory import RunDirectory


def of(directory: RunDirectory) -> str:
    """Who a run is now."""
    return f"{directory.experiment}/{directory.id}@{directory.record()['uid']}"


def recorded(record: dict[str, Any]) -> str:
    """Who the run of a record was when it was made."""
    return f"{record['experiment']}/{record['id']}@{record['uid']}"


def is_anothers(identity: str, directory: RunDirectory) -> bool:
    """Whether another run of the same runs folder is the one of that identity: ours is a copy of it."""
    place, _, uid = identity.rpartition("@")
    other = RunDirectory(directory.path.absolute().parent.parent / place)
    if other.path == directory.path.absolute():
        return False
    with contextlib.suppress(BadInput):  # there is none, or nobody can say who it is
        return bool(other.record().get("uid") == uid)
    return False
