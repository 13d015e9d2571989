"""How runs are found: the runs folder, local or in an object store, and the run that a reference means."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from stoker import object_store, store_urls
from stoker.errors import BadInput, nearest
from stoker.object_store import Unreachable
from stoker.run import mirror
from stoker.run.directory import RunDirectory
from stoker.words import shortest

log = logging.getLogger("stoker")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LONGEST = 100  # characters of a name made by `folder_name`


def folder(name: Path | str) -> Path:
    """A runs folder by its path; for the URL of one in an object store, its local working copy.

    Raises BadInput for an invalid URL.
    """
    return object_store.working_copy(str(name)) if store_urls.is_url(str(name)) else Path(name)


def asked_for(given: Path | str | None) -> str:
    """The path or URL of the runs folder that a caller gives, or else STOKER_RUNS, or else `runs`."""
    return str(given if given is not None else os.environ.get("STOKER_RUNS") or "runs")


def given_folder(given: Path | str | None) -> Path:
    """The runs folder by what is `asked_for`, as `folder` finds it. Raises BadInput."""
    return folder(asked_for(given))


def shown(runs: Path) -> str:
    """A runs folder as it was named: its path, or its URL if it is the working copy of an object store."""
    store = object_store.of(runs.absolute())
    return store.url if store is not None else str(runs)


def option(runs: Path) -> str:
    """The option ` --runs DIR` that a command needs to use a runs folder; empty if that is the default."""
    there, usual = shown(runs), asked_for(None)
    if there == usual.rstrip("/") or runs.resolve() == Path(usual).resolve():
        return ""
    return f" --runs {shlex.quote(there if store_urls.is_url(there) else shortest(runs))}"


def locate(runs: Path, experiment: str, run_id: str) -> RunDirectory:
    """The directory of a run by experiment and id, existing or not. Raises BadInput for an invalid name."""
    checked(experiment, "experiment")
    checked(run_id)
    return RunDirectory(runs / experiment / run_id)


def checked(name: str, what: str = "name") -> str:
    """Check that a name is a valid folder name. Raises BadInput."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"{what} {name!r} is not a valid folder name: use letters, digits, '.', '_' and '-'")
    return name


def folder_name(text: str) -> str:
    """The valid folder name closest to a text: `train it` becomes `train-it`.

    Text in a non-Latin script is replaced by a hash, so that two such texts get different names.
    """
    if _NAME.fullmatch(text):
        return text
    ascii_ = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_).strip("-._")[:_LONGEST]
    return name or f"script-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def named(runs: Path, experiment: str, run_id: str) -> RunDirectory:
    """Like `locate`, including what another machine added to the run."""
    return _up_to_date(locate(runs, experiment, run_id))


def every(runs: Path, *, deleted: bool = False) -> list[RunDirectory]:
    """All runs under a runs folder, oldest first.

    Args:
        deleted: include copies of runs that another machine deleted in the object store.
    """
    _tolerantly(lambda: mirror.refresh(runs), runs)
    found = (RunDirectory(file.parent) for file in runs.glob("*/*/run.json"))
    known = [run for run in found if run.exists() and (deleted or not mirror.is_deleted(run))]
    return sorted(known, key=lambda run: (run.record_file.stat().st_mtime_ns, run.id))


def find(runs: Path, reference: str, *, deleted: bool = False) -> RunDirectory:
    """The run that a path, `experiment/id`, an id, or the start of an id refers to. Raises BadInput.

    Args:
        deleted: also a run that another machine deleted in the object store, and of which a copy is here.
    """
    run = _at_path(runs, reference)
    if run is not None and (deleted or not mirror.is_deleted(run)):
        return run
    known = every(runs, deleted=deleted)
    return _named_in(known, reference) or _by_id(runs, reference, known)


def meant(runs: Path, reference: str, known: Callable[[], Sequence[RunDirectory]]) -> list[RunDirectory]:
    """The run that `find` finds, or all runs of an experiment, by its name or path, oldest first.

    Args:
        known: lists all runs of the folder; not called for the path of a run.

    Raises:
        BadInput: the reference matches nothing, or several runs that are not an experiment.
    """
    run = _at_path(runs, reference)
    if run is not None and not mirror.is_deleted(run):
        return [run]
    found = members(runs, reference, known())
    if not found:
        named_so = _named_in(known(), reference)
        if named_so is not None:
            return [named_so]
        return [_by_id(runs, reference, known(), or_experiment=True)]
    others = [run for run in known() if run.id == reference]
    if others and found != others:
        name = f"{others[0].experiment}/{reference}"
        raise BadInput(f"{reference!r} is an experiment and a run: write {reference + '/'!r} or {name!r}")
    return found


def members(runs: Path, experiment: str, known: Sequence[RunDirectory]) -> list[RunDirectory]:
    """The known runs that belong to an experiment, given by name or path."""
    folders = ((runs / experiment).absolute(), Path(experiment).absolute())
    return [run for run in known if run.path.parent.absolute() in folders]


def _at_path(runs: Path, reference: str) -> RunDirectory | None:
    """The run at a path, or below the runs folder. Raises BadInput if no reference is given."""
    if not reference:
        raise BadInput("give a run: its id, the start of its id, experiment/id, or its path")
    for path in (Path(reference), runs / reference):
        if (path / "run.json").is_file():
            return _up_to_date(RunDirectory(path.absolute()))
    return None


def _named_in(known: Sequence[RunDirectory], reference: str) -> RunDirectory | None:
    """The known run that `experiment/id` names: one in an object store may have had no copy here before."""
    found = (run for run in known if run.name == reference.rstrip("/"))
    run = next(found, None)
    return _up_to_date(RunDirectory(run.path.absolute())) if run is not None else None


def _by_id(
    runs: Path, reference: str, known: Sequence[RunDirectory], *, or_experiment: bool = False
) -> RunDirectory:
    """The one run whose id equals or starts with the reference; or_experiment: experiments match too."""
    same = [run for run in known if run.id == reference]
    matches = same or [run for run in known if run.id.startswith(reference)]
    if len(matches) == 1:
        return _up_to_date(RunDirectory(matches[0].path.absolute()))
    if matches:
        several = ", ".join(run.name for run in matches[:8])
        raise BadInput(f"{reference!r} matches several runs: {several}; give more of the name")
    names = [run.id for run in known] + [run.experiment for run in known if or_experiment]
    what = "run or experiment" if or_experiment else "run"
    raise BadInput(
        f"no {what} {reference!r} under {shown(runs)}{nearest(reference, names)}; "
        "`stoker runs list` shows all runs"
    )


def _up_to_date(run: RunDirectory) -> RunDirectory:
    """A run with everything that another machine added to it, except the tensors of checkpoints."""
    copy = mirror.of(run)
    if copy is not None and not run.trained_here:
        _tolerantly(lambda: copy.fetch(artifacts=True), run.path)
    return run


def _tolerantly(fetch: Callable[[], None], what: Path) -> None:
    """If the store cannot be reached, use the local copy, if there is one."""
    try:
        fetch()
    except Unreachable as error:
        if not any(what.glob("**/run.json")):
            raise
        log.warning("%s; showing what is known here about %s", error, what.name)
