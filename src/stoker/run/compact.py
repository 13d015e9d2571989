"""The compacted form of a run that has ended: its view, stored as columns, which opens quickly.

It is written after a long journal was folded. It records the size of every journal file at that time, and is
ignored if the journal has changed since. It is only a cache: if it is lost, the journal is folded again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import orjson
from stoker import storage
from stoker.run.directory import RunDirectory
from stoker.run.journal import Damage
from stoker.run.series import Series
from stoker.run.state import AttemptView, LeftOut, Media, RunView, Use

FORMAT = 7
_WORTH_IT = 5_000  # points
_COLUMNS = ("x", "y", "time")
_APART = (
    "directory", "record", "attempts", "points", "system", "left_out", "used", "media", "damage",
)  # fmt: skip
"""What is known otherwise, or has a form of its own; the rest of a view is written as it is."""
_REST = tuple(field.name for field in fields(RunView) if field.name not in _APART)


def save(view: RunView, sizes: Mapping[str, int]) -> None:
    """Write the compacted form of a run whose journal files have these sizes, unless it has few points."""
    if sum(len(s) for s in [*view.points.values(), *view.system.values()]) < _WORTH_IT:
        return
    from safetensors.numpy import save as dump

    columns: dict[str, Any] = {}
    for group, found in (("points", view.points), ("system", view.system)):
        for index, series in enumerate(found.values()):
            columns.update({f"{group}.{index}.{name}": getattr(series, name) for name in _COLUMNS})
    about = {
        "format": FORMAT, "journal": dict(sizes), "points": list(view.points), "system": list(view.system),
        "view": {name: getattr(view, name) for name in _REST},
        "attempts": [asdict(a) for a in view.attempts], "media": [asdict(m) for m in view.media],
        "used": [asdict(u) for u in view.used.values()], "damage": [asdict(d) for d in view.damage],
        "left_out": [asdict(batch) for batch in view.left_out],
    }  # fmt: skip
    content = dump(columns, {"stoker": orjson.dumps(about).decode()})
    with contextlib.suppress(OSError):  # only a cache
        storage.write_atomically(view.directory.compacted, content)


def load(directory: RunDirectory, sizes: Mapping[str, int]) -> Callable[[dict[str, Any]], RunView] | None:
    """A function that makes the view from the run's record; None if this journal has no compacted form."""
    from safetensors import SafetensorError, safe_open

    if not directory.compacted.is_file():
        return None
    try:
        with safe_open(directory.compacted, framework="np") as file:
            about = orjson.loads(file.metadata()["stoker"])
            if about["format"] != FORMAT or about["journal"] != sizes:
                return None
            groups = {
                group: {
                    metric: Series(*(file.get_tensor(f"{group}.{index}.{name}") for name in _COLUMNS))
                    for index, metric in enumerate(about[group])
                }
                for group in ("points", "system")
            }
        return lambda record: _restored(directory, record, about, groups)
    except (OSError, SafetensorError, orjson.JSONDecodeError, LookupError, TypeError):
        return None


def _restored(
    directory: RunDirectory, record: dict[str, Any], about: dict[str, Any], groups: dict[str, Any]
) -> RunView:
    view = RunView(directory, record, **groups, **about["view"])
    view.notes = [(time, text) for time, text in view.notes]
    view.attempts = [AttemptView(**a) for a in about["attempts"]]
    view.media = [Media(**m) for m in about["media"]]
    view.used = {u["name"]: Use(**u) for u in about["used"]}
    view.left_out = [LeftOut(**batch) for batch in about["left_out"]]
    view.damage = [Damage(**d) for d in about["damage"]]
    return view
