"""The settings of a search, in its folder, next to the runs of its trials.

runs/<sweep>/
  sweep.json       written once: recipe, space, metric, sampler, scheduler, seed
  study.journal    Optuna's journal, see `study`
  provenance/      the code of the trials; provenance-2/ after the code has changed
  best.json        the best trial so far, rewritten when it changes
  sweep.lock       locked by the controller while it runs
  trial-0000/ ...  the runs of the trials
"""

from __future__ import annotations

import dataclasses
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import redaction, storage
from stoker.errors import BadInput
from stoker.reproduce import provenance
from stoker.run import artifacts
from stoker.run.directory import BEST, SWEEP, SWEEP_LOCK

if TYPE_CHECKING:
    from optuna.study import Study

log = logging.getLogger("stoker")

STUDY = "study.journal"
FORMAT = 1
_OF_A_SWEEP = ("nproc", "tries", "storage", "format")
"""Settings that may differ between sweeps that share a study."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All settings that determine the trials and what happens to them."""

    recipe: str
    space: Mapping[str, str]
    metric: str
    """The names of the objectives, such as `val_loss, flops`."""
    goal: str
    """The goals of the objectives, such as `min, min`."""
    sampler: str
    scheduler: str
    """The scheduler with its settings, in words."""
    seed: int
    nproc: int
    tries: tuple[Mapping[str, Any], ...] = ()
    """The values of the first trials."""
    warm_start: str = ""
    """An earlier search whose trials the sampler also learns from."""
    storage: str = ""
    """The URL of the study's database, without its password; if empty, a file next to the trials is used."""
    study: str = ""
    """The study's name in the database."""
    format: int = FORMAT


def take(folder: Path) -> int:
    """Lock a sweep's folder for this process; returns the lock's descriptor. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = storage.try_lock(folder / SWEEP_LOCK)
    except OSError as error:
        raise BadInput(
            f"cannot write the sweep to {folder}: {error.strerror}; choose another folder with --runs"
        ) from error
    if descriptor is None:
        raise BadInput(f"another process is searching in {folder}: wait for it, or give another --name")
    return descriptor


def check(folder: Path, wanted: Record) -> None:
    """Refuse a folder with runs that belong to no search, or with a different search. Raises BadInput."""
    known = storage.read_json(folder / SWEEP)
    if known:
        _refuse_changes(folder, known, wanted)
    elif any(folder.glob("*/run.json")):
        raise BadInput(f"{folder} contains runs that do not belong to a sweep: give another --name")


def begin(folder: Path, wanted: Record) -> None:
    """Write the settings of a new search once they are known to work; does nothing if the search resumes."""
    if not is_sweep(folder):
        storage.write_json(folder / SWEEP, _as_dict(wanted) | {"uid": uuid.uuid4().hex})


def provenance_of(folder: Path, code: Path) -> Path:
    """The folder of a search that records the code its trials use now.

    If the code has changed, this is logged, and the new code is recorded next to the earlier code.

    Args:
        code: the script, or a folder of the git repository.
    """
    now, number, target = provenance.gather(code, folder.parent), 1, folder / "provenance"
    while provenance.is_recorded(target):
        if provenance.same(provenance.read_code(target), now.code):
            return target
        number += 1
        target = folder / f"provenance-{number}"
    if number > 1:
        log.warning("the code has changed since the search started: new trials use the changed code")
    target.mkdir(exist_ok=True)
    provenance.write(target, now, artifacts.store(folder.parent))
    return target


def note_best(folder: Path, best: Mapping[str, Any]) -> None:
    """Write down the best trial for those who read a sweep's folder, if it has changed.

    Running trials go on if the disk refuses it: it is written again after the next end.
    """
    said = redaction.tree(dict(best))
    if storage.read_json(folder / BEST) != said:
        storage.try_to_write_json(folder / BEST, said)


def is_sweep(folder: Path) -> bool:
    """Whether a folder contains a search."""
    return (folder / SWEEP).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The settings that a search was started with. Raises BadInput."""
    known = storage.read_json(folder / SWEEP)
    if known.get("format") != FORMAT:
        raise BadInput(f"{folder / SWEEP} cannot be read, or was written by another version of stoker")
    return known


def uid(folder: Path) -> str:
    """A unique identifier of a sweep."""
    return str(read(folder)["uid"])


def shown(url: str) -> str:
    """A database's URL without its password, which may be a parameter too (`?password=`)."""
    return redaction.text(re.sub(r"(://[^:/@]*):[^@]*@", rf"\1:{redaction.REDACTED}@", url))


def check_study(study: Study, wanted: Record) -> None:
    """Record the settings in a study that sweeps share, or refuse a study with different settings.

    Raises BadInput.
    """
    told = {key: value for key, value in _as_dict(wanted).items() if key not in _OF_A_SWEEP}
    known = study.user_attrs.get("search")
    if known is None:
        study.set_user_attr("search", told)
        return
    changes = _differences(known, told)
    if changes:
        raise BadInput(f"study {wanted.study} exists with different settings: {'; '.join(changes)}")


def check_earlier(folder: Path, wanted: Record) -> None:
    """Refuse to learn from a search with a different goal or space. Raises BadInput."""
    if not is_sweep(folder):
        raise BadInput(f"--warm-start {folder.name}: there is no sweep in {folder}")
    known = read(folder)
    if (known["metric"], known["goal"]) != (wanted.metric, wanted.goal):
        raise BadInput(
            f"--warm-start {folder.name}: it optimised the {known['goal']} of {known['metric']}, "
            f"this search optimises the {wanted.goal} of {wanted.metric}"
        )
    common = known["space"].keys() & wanted.space.keys()
    ranges = {key: (known["space"][key], wanted.space[key]) for key in common}
    other = [key for key, (before, now) in ranges.items() if before != now and "[" in before + now]
    if other or not common:
        said = "; ".join(f"{key}: {ranges[key][0]} there, {ranges[key][1]} here" for key in sorted(other))
        raise BadInput(f"--warm-start {folder.name}: {said or 'the two searches have no key in common'}")


def free_name(runs: Path, name: str) -> str:
    """The name, or name-2 and so on: the first that is not taken."""
    number, found = 1, name
    while (runs / found).exists():
        number += 1
        found = f"{name}-{number}"
    return found


def _as_dict(wanted: Record) -> dict[str, Any]:
    """The settings as written to disk, without the secrets among the fixed values."""
    said: dict[str, Any] = redaction.tree(dataclasses.asdict(wanted))
    return said


def _refuse_changes(folder: Path, known: Mapping[str, Any], wanted: Record) -> None:
    if known.get("format", 0) > FORMAT:
        raise BadInput(f"{folder / SWEEP} has format {known['format']}, of a newer stoker: upgrade stoker")
    changes = _differences(known, _as_dict(wanted))
    if changes:
        raise BadInput(
            f"the search in {folder} has different settings: {'; '.join(changes)}. Give --new to start a "
            "separate one next to it, or another --name"
        )


def resolved(reference: str) -> str:
    """A recipe's reference with the path of its file, however that was written."""
    path, _, function = reference.rpartition(":")
    return f"{Path(path).resolve()}:{function}" if "/" in path else reference


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    changes = []
    for key, now in wanted.items():
        before = known.get(key)
        if key == "recipe":
            before = resolved(before or "")
        if key == "space":
            changes += _changes(before or {}, now)
        elif before != (list(now) if isinstance(now, tuple) else now):
            changes.append(f"{key}: {before} -> {now}{_of_population(before, now)}")
    return changes


def _of_population(before: Any, now: Any) -> str:
    """Why a scheduler is a different one if only --trials was changed."""
    if all("population" in str(scheduler) for scheduler in (before, now)):
        return " (a population is --trials, and stays as large as it began)"
    return ""


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    keys = sorted({*before, *now})
    return [
        f"{key}: {before.get(key, 'not searched')} -> {now.get(key, 'not searched')}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
