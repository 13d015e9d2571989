"""Packages a run as a folder that another machine, a container or MLflow can run again.

  code/             the run's code, as recorded
  vendor/           stoker, if no package index has the version that the run used
  config.yaml       every value
  requirements.txt  the lock
  run.sh            the one command
  Dockerfile        an image that runs it
  MLproject, python_env.yaml   for `mlflow run`
  README.md         what else it needs: data, by fingerprint or revision

The base image is the one that the run recorded (STOKER_IMAGE, preferably with its digest), otherwise Python's
official one: torch's packages include CUDA, and the driver is the host's.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import stoker
import yaml
from stoker import config as configs
from stoker import storage
from stoker.launch import again
from stoker.reproduce import differences, place, provenance
from stoker.reproduce.place import Place
from stoker.reproduce.stretch import Stretch
from stoker.run.state import RunView

IMAGE = "STOKER_IMAGE"
"""The variable that names the image a run is in, by name and digest."""

_IN_IMAGE = "/run"
"""Where an image has the folder."""
_LONGEST = 500
"""Maximum characters of a value that becomes a parameter of an MLflow Project."""


@dataclass(frozen=True)
class Package:
    """A folder made from a run."""

    folder: Path
    command: str
    """The one command, as in `run.sh`."""
    image: str
    data: Mapping[str, Mapping[str, Any]]
    """The data that it reads, as recorded: its path or name, and its fingerprint or revision."""
    lacking: tuple[str, ...]
    """Files of the code that were too large to record."""
    not_installed: tuple[str, ...]
    """Packages that pip cannot install, and that are not in the code."""
    secrets: tuple[str, ...]
    """Keys of the config that were secrets, which are never recorded."""


def write(seen: RunView, part: Stretch, folder: Path) -> Package:
    """Create the folder.

    Args:
        seen: the run.
        part: its steps from the beginning.
        folder: must not exist.

    Raises:
        BadInput: the code was not recorded, or its record is damaged.
        OSError: the folder cannot be written.
    """
    record = seen.directory.provenance
    there = place.materialise(record, folder / "code", seen.record["cwd"])
    lock, environment = again.read_lock(record), storage.read_json(record / provenance.ENVIRONMENT)
    (folder / "requirements.txt").write_text(lock, encoding="utf-8")
    values, secrets = configs.without_secrets(_decided(part), seen.record["sources"])
    (folder / again.CONFIG).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    imported = there.python_path(lock, environment.get("variables", {}).get("PYTHONPATH", ""))
    outside = _used_from_elsewhere(lock, there)
    if "stoker" in outside and not any(Path(path, "stoker").is_dir() for path in imported):
        _vendor(folder / "vendor")
        imported.append(str(folder / "vendor"))
    if again.imports_from_cwd(seen.record) and there.cwd.is_relative_to(folder):
        imported.append(str(there.cwd))
    command = _command(seen, part, there, folder)
    _write_script(folder / "run.sh", seen, there, folder, command, imported, environment)
    made = Package(
        folder, command, _image(environment), storage.read_json(record / provenance.DATA),
        tuple(left.path for left in there.code.left_out), tuple(name for name in outside if name != "stoker"),
        tuple(sorted(secrets)),
    )  # fmt: skip
    dockerfile = _dockerfile(made.image, lock, environment, _cwd(there, folder), _within(imported, folder))
    (folder / "Dockerfile").write_text(dockerfile, encoding="utf-8")
    has_keys = seen.recipe_reference is not None
    _write_mlproject(folder, seen, environment, _parameters(values) if has_keys else {})
    (folder / "README.md").write_text(_readme(made, seen, there, environment), encoding="utf-8")
    return made


def _decided(part: Stretch) -> dict[str, Any]:
    """The config, including what the run decided by measuring its machine."""
    precision = part.layout.get("precision")
    asked = {"precision": precision} if precision and part.config.get("precision") == "auto" else {}
    return {**part.config, **asked}


def _command(seen: RunView, part: Stretch, there: Place, folder: Path) -> str:
    """The one command, for a shell in which `$here` is the folder."""
    words, is_script = again.command(seen, there, part.world)
    said = " ".join(_quoted(word, folder) for word in words)
    if is_script:
        return f'"${{PYTHON:-python}}" {said} "$@"'
    options = f'--config "$here/{again.CONFIG}" --experiment {shlex.quote(seen.directory.experiment)}'
    several = f" --nproc {part.world}" if part.world > 1 else ""
    name = shlex.quote(seen.directory.id)
    return f'"${{PYTHON:-python}}" {said} {options} --name {name}{several} "$@"'


def _quoted(word: str, folder: Path) -> str:
    """A word for the shell; a path within the folder is resolved when it is run."""
    within = word.removeprefix(f"{folder}/")
    return shlex.quote(word) if within == word else f'"$here"/{shlex.quote(within)}'


_CHECKED = (
    "has=\"from importlib.util import find_spec as f; raise SystemExit(not (f('torch') and f('typer')))\"",
    'if ! "${PYTHON:-python}" -c "$has"; then',
    '  echo "run.sh: this environment lacks packages: activate the one that has them, or" >&2',
    '  echo "  pip install --no-deps -r $here/requirements.txt" >&2',
    "  exit 2",
    "fi",
)
"""Script lines that report what would otherwise be a traceback."""


def _write_script(
    file: Path, seen: RunView, there: Place, folder: Path, command: str, imported: Sequence[str],
    environment: Mapping[str, Any],
) -> None:  # fmt: skip
    variables = differences.computing(environment.get("variables", {}))
    paths = ":".join(f'"$here"/{shlex.quote(path)}' for path in _within(imported, folder))
    lines = [
        "#!/bin/sh",
        f"# Trains {seen.directory.name} again; takes its command's arguments.",
        "set -eu",
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *([f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"'] if paths else []),
        'export STOKER_RUNS="${STOKER_RUNS:-$here/runs}"',
        *_CHECKED,
        f'cd "$here"/{shlex.quote(_cwd(there, folder))}',
        f"exec {command}",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.chmod(0o755)


def _cwd(there: Place, folder: Path) -> str:
    """The working directory, within the folder."""
    return str(there.cwd.relative_to(folder)) if there.cwd.is_relative_to(folder) else "code"


def _within(paths: Sequence[str], folder: Path) -> list[str]:
    """Paths relative to the folder."""
    return [str(Path(path).relative_to(folder)) for path in paths]


def _used_from_elsewhere(lock: str, there: Place) -> list[str]:
    """The packages that pip cannot install and that are not in the run's code."""
    used = (package for package in differences.locked(lock).values() if package.folder)
    folders = {package.name: package.folder.partition(", commit ")[0] for package in used}
    return [name for name, folder in folders.items() if there.mapped(folder) == folder]


def _vendor(target: Path) -> None:
    """Copy this stoker, with the parts of its metadata that are the same everywhere."""
    source = Path(stoker.__file__).parent
    shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    about = importlib.metadata.distribution("stoker")
    kept = target / f"stoker-{about.version}.dist-info"
    kept.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (kept / name).write_text(about.read_text(name) or "", encoding="utf-8")


def _image(environment: Mapping[str, Any]) -> str:
    recorded = environment.get("variables", {}).get(IMAGE)
    return str(recorded or f"python:{environment.get('python', '3')}-slim")


def _dockerfile(
    image: str, lock: str, environment: Mapping[str, Any], cwd: str, imported: Sequence[str]
) -> str:
    """An image that trains the run again; and that runs other commands as where the run was.

    Args:
        cwd: the working directory, within the folder.
        imported: the paths there from which Python imports.
    """
    known = IMAGE in environment.get("variables", {})
    said = "The image of the run" if known else "The Python version of the run, which recorded no image"
    by = "" if "@sha256:" in image else ". Named by tag, so it may change"
    tools = [
        "gcc libc6-dev" if "triton" in differences.locked(lock) else "",
        "git" if "@ git+" in lock else "",
    ]
    wanted = " ".join(tool for tool in tools if tool)
    installed = f"RUN apt-get update && apt-get install -y --no-install-recommends {wanted}" if wanted else ""
    gpus = (
        "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        if environment.get("gpus")
        else ""
    )
    paths = _in_dockerfile(":".join(f"{_IN_IMAGE}/{path}" for path in imported))
    lines = [
        f"# {said}{by}.",
        f"FROM {image}",
        gpus,
        installed,
        f"WORKDIR {_IN_IMAGE}",
        "COPY requirements.txt .",
        "RUN pip install --no-cache-dir --no-deps -r requirements.txt",
        "COPY . .",
        f"ENV PYTHONPATH={paths}${{PYTHONPATH:+:$PYTHONPATH}}" if imported else "",
        f"WORKDIR {_in_dockerfile(f'{_IN_IMAGE}/{cwd}')}",
        f'ENTRYPOINT ["{_IN_IMAGE}/run.sh"]',
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _in_dockerfile(word: str) -> str:
    """A word as a Dockerfile's ENV and WORKDIR read it."""
    return '"' + re.sub(r'(["\\$])', r"\\\1", word) + '"'


def _parameters(values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The config's keys as MLflow can name them, each with the key and the text of its value.

    MLflow substitutes them with `str.format`, in which a dot would mean an attribute. A key is omitted if a
    command line would read its value differently, or if the value is too long for MLflow.
    """
    named = {key.replace(".", "_"): (key, _text(value)) for key, value in values.items()}
    return {
        name: (key, text)
        for name, (key, text) in named.items()
        if name.isidentifier() and len(text) <= _LONGEST and (key == name or name not in values)
        and not (isinstance(values[key], str) and text.lower() in ("null", "none"))
    }  # fmt: skip


def _text(value: Any) -> str:
    """A value as written on the command line."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _write_mlproject(
    folder: Path, seen: RunView, environment: Mapping[str, Any], parameters: Mapping[str, tuple[str, str]]
) -> None:
    """The two files of an MLflow Project (https://mlflow.org/docs/latest/ml/projects)."""
    given = "".join(f" {key}={{{name}}}" for name, (key, _) in parameters.items())
    declared = {name: {"type": "string", "default": text} for name, (_, text) in parameters.items()}
    main = {"parameters": declared, "command": f"sh run.sh{given}"} if declared else {"command": "sh run.sh"}
    project = {
        "name": f"{seen.directory.experiment}-{seen.directory.id}",
        "python_env": "python_env.yaml",
        "entry_points": {"main": main},
    }
    made_of = {
        "python": environment.get("python", ""),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "MLproject").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(made_of, sort_keys=False), encoding="utf-8")


def _readme(made: Package, seen: RunView, there: Place, environment: Mapping[str, Any]) -> str:
    name = seen.directory.name
    return "\n".join([
        f"# {name}",
        "",
        f"A training run with everything needed to repeat it. It ended at step {seen.step:,}.",
        "",
        "```sh",
        "pip install --no-deps -r requirements.txt   # once, in a separate environment",
        "./run.sh                                    # trains; the new run is then under runs/",
        "```",
        "",
        "or `docker build -t again . && docker run -v ./runs:/run/runs again` (on GPUs with `--gpus all`),",
        "or `mlflow run . --env-manager local`, where `-P key=value` overrides a key (with `_` for a dot).",
        "",
        *_needs(made, there),
        "## Recorded",
        "",
        *_recorded(there, environment),
        "",
    ])  # fmt: skip


def _needs(made: Package, there: Place) -> Iterator[str]:
    """What is not in the folder."""
    folder = there.cwd.relative_to(made.folder) if there.cwd.is_relative_to(made.folder) else Path("code")
    lines = [f"- {name}: {_data(about, folder)}" for name, about in made.data.items()]
    lines += [f"- `code/{path}`, which the record of the code does not include" for path in made.lacking]
    lines += [f"- {key}, a secret, which is never recorded: `./run.sh {key}=...`" for key in made.secrets]
    lines += [f"- the package {package}, which was imported from a folder" for package in made.not_installed]
    if lines:
        yield from ("## Needs", "", *lines, "")


def _data(about: Mapping[str, Any], folder: Path) -> str:
    """Where recorded data was, and its content; what is not a path has no size."""
    within = (
        f" (relative to `{folder}`, or override its key: `./run.sh key=PATH`)" if "absolute" in about else ""
    )
    size = f", {about['bytes']:,} bytes" if "bytes" in about else ""
    kinds = [f", {kind} `{about[kind]}`" for kind in ("revision", "fingerprint") if kind in about]
    return f"`{about['path']}`{within}{size}{''.join(kinds)}"


def _recorded(there: Place, environment: Mapping[str, Any]) -> Iterator[str]:
    code = there.code
    if code.commit:
        remote = f" of {code.remote}" if code.remote else ""
        yield f"- code: commit {code.commit}{remote}{', with uncommitted changes' if code.dirty else ''}"
    if environment:
        gpus = ", ".join(map(str, environment.get("gpus", ()))) or "no GPU"
        yield f"- Python {environment['python']} on {environment['system']}"
        yield f"- {environment['processor']}, {environment['cores']} cores, {gpus}"
