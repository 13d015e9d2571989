"""Running a run again: what is started for it, and the process that does it.

It is started the way the run was (a recipe with `stoker train`, a user's script with its command) in a
separate process, so that nothing this process has imported is in it, and the run's code takes precedence
over installed packages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from stoker import config as configs
from stoker import redaction, signals, storage
from stoker.config import COMMAND_LINE
from stoker.errors import STOP_CODES, BadInput, Stopped
from stoker.reproduce import provenance
from stoker.reproduce.code import module_file
from stoker.reproduce.place import Place
from stoker.reproduce.stretch import Stretch
from stoker.run import reproducing
from stoker.run.directory import RunDirectory
from stoker.run.reproducing import Again
from stoker.run.state import RunView
from stoker.signals import STATUS
from stoker.world import environment_of_no_rank

CONFIG = "config.yaml"
FOLDER = "again"
"""In the new run: the code that it runs, and what was requested."""
_TOLD = {code: status for status, code in STOP_CODES.items()}
"""The status of a process that ended with one of these codes."""


@dataclass(frozen=True)
class Start:
    """A process to start."""

    command: tuple[str, ...]
    cwd: Path
    variables: Mapping[str, str]
    """Its complete environment."""
    is_script: bool
    """Whether its standard output belongs to the script."""


def prepare(
    seen: RunView, part: Stretch, target: RunDirectory, there: Place,
    *, python: str, ranks: int, overrides: Sequence[str], variables: Mapping[str, str],
) -> Start:  # fmt: skip
    """Write down the request for the process that runs a run again.

    Args:
        seen: the run.
        part: which of its steps.
        target: the new run, whose folder exists.
        there: the code.
        python: the interpreter.
        ranks: the number of ranks.
        overrides: `key=value` overrides.
        variables: variables of the run that affect how it computes.

    Raises:
        BadInput: it is not known how the run was started, or a script has no keys to override.
    """
    folder = target.path / FOLDER
    words, is_script = command(seen, there, ranks)
    if is_script and overrides:
        raise BadInput(f"{overrides[0]}: the run is from a script without a recipe, which has no keys")
    if not is_script:
        values = known_values(part.config, seen.record["sources"], overrides)
        storage.write_atomically(folder / CONFIG, yaml.safe_dump(values, sort_keys=False).encode())
        words += [
            "--config", str(folder / CONFIG), "--name", target.id, "--experiment", target.experiment,
            "--runs", str(target.runs), "--nproc", str(ranks), *overrides,
        ]  # fmt: skip
    given = {configs.split(override)[0]: COMMAND_LINE for override in overrides}
    asked = Again(
        runs=str(target.runs), experiment=target.experiment, id=target.id,
        of={"experiment": seen.directory.experiment, "id": seen.directory.id, "uid": seen.record["uid"]},
        given=seen.directory.experiment, config=dict(part.config), seed=seen.record["seed"],
        provenance=str(_record_of_code(seen.directory.provenance, folder)), recipe=seen.record["recipe"],
        sources={**seen.record["sources"], **given}, layout=dict(part.layout), until=part.stop_at,
    )  # fmt: skip
    reproducing.write(folder / "again.json", asked)
    own = {**variables, reproducing.VARIABLE: str(folder / "again.json")}
    if is_script:  # other runs that it makes do not belong to the user's runs
        own["STOKER_RUNS"] = str(folder / "runs")
    return Start((python, *words), there.cwd, _environment(there, seen, own), is_script)


def run(start: Start, begun: Callable[[], bool]) -> int:
    """Run it, and return its exit code; signals are passed on to it.

    Args:
        begun: whether the run exists; until then, signals end the process.

    Raises:
        Stopped: it was told to stop before the run existed.
    """
    output = sys.stderr if start.is_script else subprocess.DEVNULL
    with _passing_on(begun) as (told, process_of):
        process = subprocess.Popen(
            start.command, cwd=start.cwd, env=dict(start.variables), stdin=subprocess.DEVNULL, stdout=output,
            process_group=0,  # Ctrl-C reaches only this process, which passes it on once
            preexec_fn=signals.at_parents_death(signal.SIGTERM),  # noqa: PLW1509 - it takes no lock
        )  # fmt: skip
        process_of.append(process)
        if told:  # before there was a process
            process.terminate()
        code = process.wait()
    status = STATUS[told[0]] if told else _TOLD.get(code)
    if status is not None and not begun():
        raise Stopped(status)
    return code


@contextlib.contextmanager
def _passing_on(begun: Callable[[], bool]) -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """The signals received, and the process that they are passed on to, once it exists.

    A process that is still importing would print a traceback at Ctrl-C: it is ended in a different way.
    """
    told: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in processes:
            process.send_signal(number if begun() else signal.SIGTERM)

    with signals.handled(pass_on, STATUS):
        try:
            yield told, processes
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


def known_values(
    config: Mapping[str, Any], sources: Mapping[str, str], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """A config without secrets, which are never recorded, and without overridden keys.

    A secret that was a default is found again by the code. Raises BadInput for any other.
    """
    given = {configs.split(override)[0] for override in overrides}
    kept, lost = configs.without_secrets({k: v for k, v in config.items() if k not in given}, sources)
    if lost:
        raise BadInput(
            f"{', '.join(sorted(lost))}: secrets are not recorded; give it again: "
            f"{' '.join(f'{key}=...' for key in sorted(lost))}"
        )
    return kept


def located(reference: str, there: Place) -> str:
    """A recipe's reference; for a file or a folder, the one in the unpacked code. Raises BadInput."""
    file, separator, function = reference.partition(":")
    if "/" not in file:
        return reference
    if not file.endswith(".py"):
        folder, _, module = file.rpartition("/")
        place, alone = there.mapped(folder or "/"), f"{Path(folder, *module.split('.'))}.py"
        if place == folder and there.mapped(alone) != alone:  # only a part of the package was recorded
            return located(f"{alone}:{function}", there)
        if module_file(Path(place), module) is None:
            raise BadInput(
                f"module {module} of {folder} is not in the record of the run's code, and no longer exists"
            )
        return f"{Path(place, module)}{separator}{function}"
    found = there.mapped(file)
    if not Path(found).is_file():
        raise BadInput(f"{file} is not in the record of the run's code, and no longer exists")
    return f"{found}{separator}{function}"


def command(seen: RunView, there: Place, ranks: int) -> tuple[list[str], bool]:
    """The Python arguments that train as a run did, without its config; and whether it is a script.

    Raises BadInput if that is not known.
    """
    reference = seen.recipe_reference
    if reference is None:
        return _script(seen, there, ranks), True
    return ["-P", "-m", "stoker", "train", located(reference, there)], False


def imports_from_cwd(record: Mapping[str, Any]) -> bool:
    """Whether a run was started by `python -m stoker`, which imports from the working directory too."""
    return str(next(iter(record.get("command", ())), "")).endswith("stoker/__main__.py")


def _script(seen: RunView, there: Place, ranks: int) -> list[str]:
    """The recorded command. Raises BadInput if it was not a script's."""
    words = [str(word) for word in seen.record.get("command", [])]
    script = there.root / there.code.script if there.code.script else None
    if script is None and words:
        script = Path(there.mapped(str(Path(seen.record["cwd"], words[0]))))
    if script is None or script.suffix != ".py" or not script.is_file():
        raise BadInput(
            f"{seen.directory.id} was started with {' '.join(words) or 'an unknown command'}, which is not a "
            "script in the record of its code: it cannot be started again"
        )
    if redaction.holds_redacted(words):
        raise BadInput(
            f"the command of {seen.directory.id} contained a secret, which is not recorded: run it yourself"
        )
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = (there.mapped(word) if word.startswith("/") else word for word in words[1:])
    return [*(several if ranks > 1 else []), str(script), *arguments]


def _environment(there: Place, seen: RunView, own: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with the run's code before everything that is installed."""
    record = seen.directory.provenance
    recorded = storage.read_json(record / provenance.ENVIRONMENT).get("variables", {}).get("PYTHONPATH", "")
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = there.python_path(read_lock(record), recorded)
    own_folder = [str(there.cwd)] if imports_from_cwd(seen.record) else []
    folders = [*first, *own_folder, *(path for path in ours if path)]
    return {**environment_of_no_rank(), **own, "PYTHONPATH": os.pathsep.join(folders)}


def read_lock(record: Path) -> str:
    """The text of a run's lock; empty if none was recorded."""
    with contextlib.suppress(OSError):
        return (record / provenance.REQUIREMENTS).read_text(encoding="utf-8")
    return ""


def _record_of_code(record: Path, folder: Path) -> Path:
    """A provenance folder with only a run's code: the environment will be that of the new process."""
    target = folder / "record"
    target.mkdir()
    for name in (provenance.CODE, "code.tar.gz", provenance.DIFF):
        if (record / name).is_file():
            storage.link_or_copy(record / name, target / name)
    return target
