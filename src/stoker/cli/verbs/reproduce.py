"""`stoker reproduce RUN`: train a run again from its record, and compare the two step by step."""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from stoker import config as configs
from stoker import exports, signals, storage
from stoker.checkpoint import manifest
from stoker.checkpoint.manifest import InvalidCheckpoint
from stoker.cli.options import Overrides
from stoker.cli.output import (
    DEFAULT_RUNS,
    Json,
    RunsFolder,
    answer,
    console,
    print_json,
    show_messages,
)
from stoker.cli.verbs.runs.common import RunName
from stoker.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIFFERS,
    STOP_CODES,
    BadInput,
    StokerError,
    Stopped,
    nearest,
)
from stoker.launch import again
from stoker.report import reproduction
from stoker.report.reproduction import Checked, Outcome, Weights
from stoker.reproduce import (
    code_changes,
    differences,
    environment,
    inputs,
    journals,
    packages,
    place,
    provenance,
    stretch,
    venv,
    weights,
)
from stoker.reproduce.differences import Difference
from stoker.reproduce.inputs import Input
from stoker.reproduce.place import Place
from stoker.reproduce.stretch import Stretch
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.series import measures_machine
from stoker.run.state import RunView
from stoker.status import FAILED, FINISHED, INTERRUPTED, STOPPED

log = logging.getLogger("stoker")

_COARSE = 0.1  # seconds


def reproduce(
    run: RunName,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Train at most N steps.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STEP", help="Start from the run's checkpoint at this step, or `latest`."
        ),
    ] = None,
    env: Annotated[
        bool, typer.Option("--env", help="Train in a virtual environment built from the run's lock file.")
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="METRIC", help="Leave this metric out of the comparison; may contain *."
        ),
    ] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    json: Json = False,
) -> int:
    """Train a run again from its record and compare each step.

    The recorded code is unpacked, data and environment are checked, and training is repeated as a new run,
    RUN-again; of a trial, SWEEP-again/TRIAL-again. KEY=VALUE overrides a key, such as the path of data that
    has moved. Exit code 0: bit-identical; 3: the results differ.
    """
    show_messages()
    seen = view.load(finding.find(runs, run))
    if seen.directory.alive:
        raise BadInput(f"{seen.directory.id} is being trained now: wait until it ends, or stop it")
    part = stretch.find(seen, _checkpoint_of(seen, start), steps)
    target = _free(seen.directory)
    try:
        with signals.raised():
            checked, starting = _prepare(seen, part, target, overrides or (), env)
            if not json:
                reproduction.print_checked(console(), checked)
            code = again.run(starting, target.exists)
    except (Stopped, KeyboardInterrupt) as told:
        if target.exists():
            raise
        return _answer_not_begun(target, getattr(told, "status", INTERRUPTED), json)
    finally:
        if not target.exists():  # a run that never started leaves nothing behind
            target.remove()
    made = _made(target, code, seen, part)
    if made.status in STOP_CODES:
        return _answer_stopped(made, json, made.status)
    left_out = ignore or ()
    try:
        with signals.raised():
            outcome = _outcome(seen, made, checked, lambda name: _is_left_out(name, left_out))
    except (Stopped, KeyboardInterrupt) as told:
        return _answer_stopped(made, json, getattr(told, "status", INTERRUPTED))
    if json:
        print_json(reproduction.as_json(outcome))
    else:
        reproduction.print_outcome(console(), outcome, finding.option(target.runs))
    return 0 if outcome.identical else EXIT_DIFFERS


def _answer_stopped(made: RunView, json: bool, status: str) -> int:
    """Print that the new run, or its comparison, was told to stop; returns the exit code for that status."""
    name = made.directory.name
    found = {"identical": None, "again": name, "status": made.status, "step": made.step}
    answer(json, found, f"{name} {made.status} at step {made.step}: nothing was compared")
    return STOP_CODES[status]


def _answer_not_begun(target: RunDirectory, status: str, json: bool) -> int:
    """Print that the new run was told to stop before it existed; returns the exit code."""
    found = {"identical": None, "again": None, "status": status, "step": 0}
    answer(json, found, f"{target.id} was told to stop before it started: nothing was created")
    return STOP_CODES[status]


def _checkpoint_of(seen: RunView, start: str | None) -> int | None:
    """The step that `--from` names. Raises BadInput if the run has no such checkpoint."""
    if start is None:
        return None
    known = _steps_to_begin_from(seen)
    if not known:
        raise BadInput(f"--from {start}: {seen.directory.id} has no checkpoint before its last step")
    if start == "latest":
        return known[-1]
    if not start.isdecimal() or int(start) not in known:
        raise BadInput(
            f"--from {start}: give a step with a checkpoint ({', '.join(map(str, known))}), or latest"
        )
    return int(start)


def _steps_to_begin_from(seen: RunView) -> list[int]:
    """The steps of the run's checkpoints, without that of its last step."""
    steps = [manifest.step_of(path) for path in manifest.committed(seen.directory.checkpoints)]
    return [step for step in steps if step < seen.step]


def _free(of: RunDirectory) -> RunDirectory:
    """The new run: the first unused name of ID-again, ID-again-2 and so on.

    It is in the experiment of the original; of a trial, in one of its own, as it is no trial of the search.
    """
    folder, name, number = of.path.parent, finding.checked(f"{of.id}-again"), 1
    while RunDirectory(folder / name).is_trial:
        folder = folder.with_name(finding.checked(f"{folder.name}-again", "experiment"))
    while (folder / name).exists():
        number += 1
        name = f"{of.id}-again-{number}"
    return RunDirectory(folder / name)


# -- before the training --------------------------------------------------------------------


def _prepare(
    seen: RunView, part: Stretch, target: RunDirectory, overrides: Sequence[str], env: bool
) -> tuple[Checked, again.Start]:
    """Unpack the code, check what it needs, and write the request for the new run. Raises BadInput."""
    folder = target.path / again.FOLDER
    folder.mkdir(parents=True)
    record, cwd = seen.directory.provenance, Path(seen.record["cwd"])
    given = _given(part, overrides)
    recorded = storage.read_json(record / provenance.DATA)
    overrides = inputs.resolved(overrides, part.config, recorded)
    kept = {key: value for key, value in part.config.items() if key not in given}
    of_data = [str(about["path"]) for about in recorded.values()]
    has_keys = seen.recipe_reference is not None  # the keys of a script are not used here
    words = [] if has_keys else [str(word).rpartition("=")[2] for word in seen.record.get("command", [])[1:]]
    named = [path for path in (*inputs.paths_of(kept), *words) if path not in of_data]
    top = folder / "code"
    root, inside = inputs.layout(provenance.read_code(record), [*named, *of_data], cwd)
    if not inside.is_relative_to(root):
        (top / inside).mkdir(parents=True)
    there = place.materialise(record, top / root, str(top / inside))
    linking = inputs.Linking(there, top, cwd, *_span(seen))
    linking.data(recorded)
    lacking = linking.left_out()
    linked, changed = linking.named(named)
    data = inputs.check(linking, recorded, part.config if has_keys else {}, given)
    lock, then = again.read_lock(record), storage.read_json(record / provenance.ENVIRONMENT)
    python = _python(lock, then) if env else sys.executable
    on_gpu, own = environment.on_gpu(part.layout, then), differences.computing(then.get("variables", {}))
    now, has = _now({**os.environ, **own}, python if env else None)
    ranks = min(part.world, len(now["gpus"]) or part.world) if on_gpu else part.world
    if part.after:
        _take_checkpoint(seen, target, part.after)
    starting = again.prepare(
        seen, part, target, there, python=python, ranks=ranks, overrides=overrides, variables=own
    )
    beside = venv.not_installed(lock) if env else {}
    found = _differences(then, now, lock, has, on_gpu=on_gpu, beside=beside)
    return Checked(
        of=seen.directory.name, name=target.name, part=part, code=there.code,
        changed_since=tuple(code_changes.changed_since(there.code)), lacking=tuple(lacking), data=tuple(data),
        linked=tuple(linked), not_linked=tuple(changed),
        packages=len(differences.locked(lock)), variables=own, differences=tuple(found),
        doubts=tuple(_doubts(part, there, data, ranks=ranks, on_gpu=on_gpu, beside=beside)),
        environment=f"{python}, built from the lock" if env else "",
    ), starting  # fmt: skip


def _span(seen: RunView) -> tuple[float, float]:
    """When a run began and ended; a moment earlier, as files have the time of a coarser clock."""
    return seen.started - _COARSE, max((a.ended or a.last_event for a in seen.attempts), default=seen.started)


def _given(part: Stretch, overrides: Sequence[str]) -> set[str]:
    """The overridden keys. Raises BadInput if the run has no such key."""
    given = {configs.split(override)[0] for override in overrides}
    for key in given - part.config.keys():
        raise BadInput(f"the run has no key {key!r}{nearest(key, part.config)}")
    return given


def _python(lock: str, then: Mapping[str, Any]) -> str:
    """The interpreter of an environment built from the lock. Raises BadInput."""
    if not lock or "python" not in then:
        raise BadInput("--env: the run has no record of its packages to build an environment from")
    return str(venv.build(lock, then["python"], storage.cache_folder() / "environments"))


def _now(variables: Mapping[str, str], python: str | None) -> tuple[dict[str, Any], str]:
    """This machine and its packages, those of this process or of another interpreter; and their lock."""
    if python is not None:
        return venv.describe(python, variables)
    installed = packages.installed()
    return environment.describe(installed, variables), packages.lock(installed)


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], lock: str, has: str,
    *, on_gpu: bool, beside: Collection[str],
) -> Iterator[Difference]:  # fmt: skip
    """The differences between the run's environment and the present one.

    Args:
        then, now: both as in `environment.json`.
        lock, has: the run's lock, and the lock of the packages installed now.
        on_gpu: whether the run computed on a GPU.
        beside: packages to ignore.
    """
    if not then:
        return
    for found in differences.packages(lock, has):
        if found.before and found.name not in beside:
            yield found
    own = differences.computing(then.get("variables", {}))
    for found in differences.environment(then, now, on_gpu=on_gpu):
        computing = found.kind != "variable" or (found.matters and found.name not in own)
        if computing and found.name != "memory_bytes":
            yield found


def _doubts(
    part: Stretch, there: Place, data: Sequence[Input],
    *, ranks: int, on_gpu: bool, beside: Mapping[str, str],
) -> Iterator[str]:  # fmt: skip
    """Reasons, besides the differences, why bit-identical results are not guaranteed."""
    if ranks != part.world:
        yield f"{ranks} ranks instead of {part.world}: sums over ranks are added in a different order"
    if on_gpu and not part.config.get("deterministic", False):
        yield "deterministic=false on a GPU: kernels may add in any order"
    if on_gpu and part.config.get("micro_batch") == "auto":
        yield "micro_batch=auto: the GPU's memory decides how a batch is split"
    yield from (f"data {one.name!r} has changed" for one in data if one.changed)
    if there.code.redacted:
        yield f"secrets were removed from the record of {', '.join(there.code.redacted)}"
    if beside:
        folders = ", ".join(f"{name} ({folder})" for name, folder in beside.items())
        yield f"pip cannot install packages that were used from a folder: {folders}"


def _take_checkpoint(seen: RunView, target: RunDirectory, step: int) -> None:
    """Give the new run a checkpoint to start from, as links or copies of its files. Raises BadInput."""
    source = manifest.folder(seen.directory.checkpoints, step)
    try:
        found = manifest.mended(source, exports.mend(seen))
    except InvalidCheckpoint as error:
        others = ", ".join(str(known) for known in _steps_to_begin_from(seen) if known != step)
        why = f"cannot be used: {error}" if source.is_dir() else "is no longer kept"
        which = f"Choose another with --from: {others}" if others else "It has no other"
        raise BadInput(
            f"{seen.directory.id} starts from the checkpoint of step {step}, which {why}. {which}"
        ) from error
    shutil.copytree(found.path, target.checkpoints / found.path.name, copy_function=storage.link_or_copy)


# -- after the training ---------------------------------------------------------------------


def _made(target: RunDirectory, code: int, seen: RunView, part: Stretch) -> RunView:
    """The new run. Raises StokerError if it does not exist, or failed where the original did not."""
    if not target.exists():
        kind = BadInput if code == EXIT_BAD_INPUT else StokerError
        raise kind(f"the new run could not be started (exit code {code}): see the messages above")
    made = view.load(target)
    failed_likewise = made.status == seen.status == FAILED and made.step >= (part.until or seen.step)
    if failed_likewise or made.status in (FINISHED, STOPPED, *STOP_CODES):
        return made
    raise StokerError(
        f"{target.name} {made.status} at step {made.step}: {_error(made) or f'exit code {code}'}; "
        f"its log is in {target.logs}"
    )


def _error(of: RunView) -> str:
    """The error that ended a run; empty if there was none."""
    return (of.attempts[-1].error or "") if of.attempts else ""


def _outcome(seen: RunView, made: RunView, checked: Checked, leave_out: Callable[[str], bool]) -> Outcome:
    part = checked.part
    after = part.after or None  # from the beginning on, with what was measured before the first step
    return Outcome(
        checked, str(made.directory.path),
        journals.compare(
            seen.points, made.points, after=after, until=part.until, cut=part.stop_at, leave_out=leave_out
        ),
        _weights(seen, made, part), configs.drift(part.config, made.record["config"]),
        _fingerprints(seen, made), (_error(seen), _error(made)) if made.status == FAILED else None,
    )  # fmt: skip


def _is_left_out(name: str, patterns: Sequence[str]) -> bool:
    return measures_machine(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weights(seen: RunView, made: RunView, part: Stretch) -> Weights:
    """Which checkpoints and exports that both runs have in the same files are equal, and which are not."""
    before, now = _sums(seen, part), _sums(made, part)
    both = [name for name in before if name in now and before[name].keys() == now[name].keys()]
    same: list[str] = []
    other: list[str] = []
    for name in both:
        into = same if all(_equal(before[name][file], now[name][file]) for file in before[name]) else other
        into.append(name)
    return Weights(tuple(same), tuple(other))


def _equal(one: tuple[str, Path], other: tuple[str, Path]) -> bool:
    """Whether two files have equal weights.

    Of a checkpoint that is only in a store the checksum decides: equal ones are equal in their bytes.
    """
    there = one[1].is_file() and other[1].is_file()
    return one[0] == other[0] or (there and weights.same(one[1], other[1]))


def _sums(of: RunView, part: Stretch) -> dict[str, dict[str, tuple[str, Path]]]:
    """The weight files of a run with their checksums, by checkpoint or artifact; no damaged checkpoint's."""
    found = {}
    for path in manifest.committed(of.directory.checkpoints):
        if part.after < manifest.step_of(path) <= (part.until or of.step):
            try:
                sums, comparable = manifest.sums(path), manifest.is_determined(path)
            except InvalidCheckpoint as error:
                log.warning("the weights of %s are not compared: %s", path, error)
                continue
            if comparable or all((path / name).is_file() for name in sums):
                found[path.name] = {name: (xxh3, path / name) for name, xxh3 in sums.items()}
            else:
                log.warning("the weights of %s, of an older format, are not here: not compared", path.name)
    if part.until is None:
        for name, event in of.artifacts.items():
            if event["kind"] in ("model", "adapter"):
                files = (file for file in event["files"] if file["path"].endswith(".safetensors"))
                found[name] = {f["path"]: (f["sha256"], of.directory.path / f["path"]) for f in files}
    return {name: files for name, files in found.items() if files}


def _fingerprints(seen: RunView, made: RunView) -> dict[str, tuple[str | None, str | None]]:
    """The fingerprints of the inputs that differ between the two runs."""
    before, now = (
        inputs.fingerprints(storage.read_json(of.directory.provenance / provenance.DATA), of.tags)
        for of in (seen, made)
    )
    return configs.drift(before, now)
