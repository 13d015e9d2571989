"""Opening a run: the record of a new run, its lock and its lease, and the reasons to refuse it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import shlex
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from stoker import config as configs
from stoker import object_store, redaction, storage
from stoker.errors import BadInput
from stoker.run import directory, lease, mirror, rendezvous, values
from stoker.run.directory import RunDirectory
from stoker.world import World

_PACKAGE = Path(configs.__file__).parent


def record(
    run: RunDirectory,
    config: Any,
    sources: Mapping[str, str] | None,
    recipe: Mapping[str, Any] | None,
    seed: int,
    parents: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """The contents of `run.json` for a new run, with secrets redacted.

    From now on the secrets in the config are redacted in all that this process records. Raises TypeError
    for a config that cannot be recorded.
    """
    known = values.of_config(config)  # first: the command and the sources have its secrets too
    told = _sources_in_script(config, known) if sources is None else sources
    return {
        "uid": uuid.uuid4().hex,
        "id": run.id,
        "experiment": run.experiment,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redaction.command(sys.argv),
        **({"module": name} if (name := module()) is not None else {}),
        "cwd": str(Path.cwd()),
        "recipe": dict(recipe or {}),
        "config": known,
        "sources": {key: redaction.text(source) for key, source in told.items()},
        "seed": seed,
        "parents": list(parents),
    }


def _sources_in_script(config: Any, known: Mapping[str, Any]) -> dict[str, str]:
    """Where the values of a config are from that a script gave to `Run`."""
    if dataclasses.is_dataclass(config):
        return configs.sources_of(config)
    return dict.fromkeys(known, configs.SCRIPT)


def script() -> Path | None:
    """The user's script that this process runs; None for an installed command or a notebook."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    installed = path.is_relative_to(Path(sys.prefix).resolve()) or path.is_relative_to(_PACKAGE)
    return None if installed or not path.is_file() else path


def module() -> str | None:
    """The module of the user's that this process runs, as of `python -m`; None for a script."""
    known = getattr(sys.modules.get("__main__"), "__spec__", None)
    return None if known is None or script() is None else str(known.name).removesuffix(".__main__")


def refuse_in_import() -> None:
    """Raise BadInput if this is a process of multiprocessing's that imports the user's script as it starts.

    Without the guard every worker of a loader would begin to train.
    """
    if worker_imports_script():
        raise BadInput(
            "the script trains when a worker process imports it: put what it does, from opening the run on, "
            'below `if __name__ == "__main__":`'
        )


def worker_imports_script() -> bool:
    """Whether this is a process of multiprocessing's that imports the user's script as it starts.

    multiprocessing imports the script as `__mp_main__`, which becomes `__main__` once the import is over.
    """
    importing = sys.modules.get("__mp_main__")
    starting = getattr(multiprocessing.current_process(), "_inheriting", False)
    return starting and importing is not None and importing is not sys.modules.get("__main__")


def new_id(world: World) -> str:
    """The id of a new run. Several processes derive the same id from their job id, without communicating."""
    if world.size == 1:
        return directory.new_id()
    if not world.job:
        raise BadInput(f"{world.size} processes train one run: give it a name that they can agree on")
    return f"job-{hashlib.sha256(world.job.encode()).hexdigest()[:12]}"


def take(run: RunDirectory, opening: rendezvous.Opening) -> int:
    """Lock a run for this process. Comes first, so that only one of two simultaneous starts succeeds."""
    try:
        lock = _made_and_locked(run)
    except OSError as error:
        raise directory.unwritable(run, error) from error
    if lock is None and storage.held_here(run.lock_file):
        raise BadInput(
            f"this process already has {run.path} open: call run.close() on it first, or open "
            "runs using `with stoker.Run(...) as run:`, which closes them"
        )
    if lock is None:
        raise lease.Busy(
            f"another process is training {run.path} now: wait for it, stop it, or choose another name"
        )
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, orjson.dumps(dataclasses.asdict(opening)), 0)
    except OSError as error:
        os.close(lock)
        raise directory.unwritable(run, error) from error
    storage.release_in_children(lock)
    return lock


def _made_and_locked(run: RunDirectory) -> int | None:
    """The lock of a run whose directory is made if it is missing; None if another process holds it."""
    for last in (False, False, True):
        run.path.mkdir(parents=True, exist_ok=True)
        try:
            return storage.try_lock(run.lock_file)
        except FileNotFoundError:  # another process that has not used it has deleted it
            if last:
                raise
    return None


def lease_of(run: RunDirectory, *, trains: bool = True) -> lease.Lease | None:
    """Take the lease of a run that other machines can reach, and fetch what they added to it.

    Returns None if the run has no lease. Raises BadInput if another machine is training the run, Unreachable
    if its object store does not answer.

    Args:
        trains: whether to train under it; see `lease.Lease`.
    """
    held = lease.of(run.path, trains=trains)
    if held is None:
        return None
    was_here = held.take()
    try:
        copy = mirror.of(run)
        if copy is not None and not (was_here and _is_unchanged(copy)):
            if not was_here:
                copy.make_room()
            copy.fetch(newer_there=True)
        held.note_here()  # only now: whoever fails or is killed before has not all of it
    except BaseException:
        held.release()
        raise
    return held


def _is_unchanged(copy: mirror.Mirror) -> bool:
    """Whether the store has the same run still, as far as it answers; otherwise the copy is set aside."""
    try:
        return not copy.make_room()
    except object_store.Unreachable:
        return True


@contextlib.contextmanager
def kept_from_training(run: RunDirectory) -> Iterator[None]:
    """Keep a run from being trained, here or elsewhere, within this block. Raises BadInput if it is now."""
    try:
        lock = storage.try_lock(run.lock_file)
    except OSError as error:
        raise directory.unwritable(run, error) from error
    if lock is None:
        raise BadInput(f"run {run.id!r} is being trained now: stop it first")
    try:
        held = lease_of(run, trains=False)
        try:
            yield
        finally:
            if held is not None and run.exists():
                held.release()
    finally:
        os.close(lock)


@dataclasses.dataclass(frozen=True)
class Differences:
    """How the config of a rank differs from that of rank 0: key -> (here, there)."""

    refused: dict[str, tuple[Any, Any]]
    allowed: dict[str, tuple[Any, Any]]
    """Those that may be meant: a folder can be elsewhere on each machine, and a script without a recipe may
    record what belongs to a rank, such as its device."""


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], drift: Mapping[str, Sequence[Any]]
) -> Differences:
    """The differences between the configs of two ranks, in keys that both have.

    A default that neither was given is not compared: it may depend on the machine. Nor is what was redacted.

    Args:
        here: the record of this rank; see `record`.
        there: that of the run.
        drift: what the attempt has changed in that: key -> (old, new).
    """
    found = Differences({}, {})
    config = {**there["config"], **{key: new for key, (_, new) in drift.items()}}
    for key in here["config"].keys() & config.keys() - _defaults(here, there, drift):
        pair = (here["config"][key], config[key])
        if pair[0] != pair[1] and not redaction.holds_redacted(list(pair)):
            may_differ = configs.may_differ(key, *pair)
            into = found.allowed if may_differ or not here["recipe"] else found.refused
            into[key] = pair
    return found


def _defaults(here: Mapping[str, Any], there: Mapping[str, Any], drift: Mapping[str, Any]) -> set[str]:
    """The keys that neither of two ranks was given."""
    of_both = here["sources"].items() & there["sources"].items()
    return {key for key, source in of_both if source == configs.DEFAULT and key not in drift}


def said_of(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """The differences between the configs of two ranks as text."""
    return ", ".join(
        f"{key} is {configs.shown(here)} here and {configs.shown(there)} there"
        for key, (here, there) in sorted(differences.items())
    )


def explain_drift(run: RunDirectory, changes: Mapping[str, tuple[Any, Any]], has_recipe: bool) -> str:
    """The error message for a changed config: what changed, and how to resume the run with the change."""
    said = ", ".join(
        f"{key} was {configs.shown(old)} and is {configs.shown(new)} now"
        for key, (old, new) in changes.items()
    )
    overrides = " ".join(
        f"{key}={shlex.quote(configs.shown(new)) if new != '' else ''}" for key, (_, new) in changes.items()
    )
    if has_recipe:
        way = f"`stoker resume {run.id} {overrides}`, or choose another --name"
    else:
        way = "stoker.Run(..., accept_drift=True), or choose another name"
    return f"run {run.id!r} exists with a different config: {said}. To resume it with the change, use {way}"
