"""Reading runs from Python, and the metrics of several runs as one table.

for run in stoker.runs("digits"):
    print(run.directory.id, run.status, run.config["lr"], run.last("val_accuracy"))
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from stoker.errors import BadInput, StokerError
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("stoker")


def runs(*references: str | Path, runs: Path | str | None = None) -> list[RunView]:
    """Read runs: their current config, status, tags and metrics. Does not import torch.

    An unreadable run is left out with a warning if it was not named itself but is part of an experiment or of
    all runs. For runs in an object store the journals are downloaded; artifacts and logs are downloaded only
    for a run that is named itself.

    Args:
        references: a run by its id, the start of its id, `experiment/id` or its path; an experiment (or a
            sweep) by its name or path, which means all of its runs. By default all runs.
        runs: the folder that contains the runs, or the URL of one in an object store; by default STOKER_RUNS,
            else `runs/`.

    Returns:
        Each run once, in the order of the references; the runs of an experiment, and all runs, oldest first.

    Raises:
        BadInput: a reference matches no run, or several runs that are not an experiment; a run cannot be read
            that was named or is the only one of its experiment; or there are no runs.
        Unreachable: the object store cannot be reached, and none of its runs is known here.
    """
    folder = finding.given_folder(runs)
    return read(folder.absolute(), [str(reference) for reference in references])


def read(folder: Path, references: Sequence[str]) -> list[RunView]:
    """Like `runs`, for a folder on this machine."""
    known = functools.cache(lambda: finding.every(folder.absolute()))
    found: list[RunView] = []
    for reference in references:
        meant = finding.meant(folder, reference, known)
        found += [view.load(meant[0])] if len(meant) == 1 else _readable(meant)
    if not references:
        found = _readable(known())
    if not found:
        raise BadInput(
            f"no readable run under {finding.shown(folder)}; give another folder with runs= or STOKER_RUNS"
        )
    return list({seen.directory.path.resolve(): seen for seen in found}.values())


def tolerantly(run: RunDirectory) -> tuple[RunView | None, str]:
    """A run, or the reason it cannot be read: an unreadable run does not keep the others from being read."""
    try:
        return view.load(run), ""
    except (StokerError, OSError, LookupError, TypeError, ValueError) as error:
        return None, str(error) if isinstance(error, StokerError) else f"{run.path}: {error!r}"


def table(views: Sequence[RunView], *, config: bool = False) -> pyarrow.Table:
    """The metrics of runs, one run after another: the rows of `RunView.metrics`, with the union of columns.

    For several runs the first column is `run`: `experiment/id`, or the path if two runs in different folders
    share that name. A metric that has the name of another column becomes `metrics.NAME`.

    Args:
        config: whether to add config keys and params as columns `config.KEY`: numbers, strings and booleans
            keep their type if all values of a key have the same type, else they become strings; lists and
            mappings become JSON.
    """
    import pyarrow as pa

    tables = [seen.metrics() for seen in views]
    row_of = np.repeat(np.arange(len(views)), [len(metrics) for metrics in tables])  # (rows,)
    before = {"run": _names(views)} if len(views) > 1 else {}
    after = _config(views) if config else {}
    metrics = pa.concat_tables(tables, promote_options="default")
    columns = {
        **{name: _column(values).take(pa.array(row_of)) for name, values in before.items()},
        "step": metrics["step"],
        **{
            f"metrics.{name}" if name in (*before, *after) else name: metrics[name]
            for name in sorted(metrics.column_names)
            if name != "step"
        },
        **{name: _column(values).take(pa.array(row_of)) for name, values in after.items()},
    }
    return pa.table(columns)


def _readable(directories: Sequence[RunDirectory]) -> list[RunView]:
    found = []
    for directory in directories:
        seen, error = tolerantly(directory)
        if seen is None:
            log.warning("left out: %s", error)
        else:
            found.append(seen)
    return found


def _names(views: Sequence[RunView]) -> list[str]:
    names = [seen.directory.name for seen in views]
    return names if len(set(names)) == len(names) else [str(seen.directory.path) for seen in views]


def _config(views: Sequence[RunView]) -> Mapping[str, list[Any]]:
    """By column, the value of each run, None if it has no value."""
    said = [{**seen.config, **seen.params} for seen in views]
    return {f"config.{key}": [of_run.get(key) for of_run in said] for key in sorted(set().union(*said))}


def _column(values: Sequence[Any]) -> pyarrow.Array:
    """Values of the same type unchanged, otherwise as strings; None becomes null."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({bool}, {str}):
        try:
            return pa.array([float(v) if float in kinds and v is not None else v for v in values])
        except OverflowError:  # beyond 64 bits
            pass
    return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())
