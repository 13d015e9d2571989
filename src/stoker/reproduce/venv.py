"""Builds a virtual environment from the lock of a run, and keeps it in the cache.

Only what is in the lock is installed by pip: the lock is complete, so pip resolves nothing. stoker itself
is the one that is running, since its lock names a folder at a commit, which pip cannot install.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import stoker
from stoker import machine, storage
from stoker.errors import BadInput, StokerError
from stoker.reproduce import differences

log = logging.getLogger("stoker")

_COMPLETE = "complete"
_DESCRIBE = """
import orjson
from stoker.reproduce import environment, packages
installed = packages.installed()
print(orjson.dumps([environment.describe(installed), packages.lock(installed)]).decode())
"""


def build(lock: str, python: str, cache: Path) -> Path:
    """The interpreter of a virtual environment in which a lock is installed.

    Args:
        lock: the text of `requirements.txt`.
        python: the version of the run, such as 3.11.2; any of the same minor version is used.
        cache: the folder for environments, named by what they are made of.

    Raises:
        BadInput: this Python version is not installed.
        StokerError: pip could not install the lock.
    """
    base = _interpreter(python)
    made_of = f"{machine.output([base, '--version'])}\n{stoker.__file__}\n{lock}"
    folder = cache / hashlib.sha256(made_of.encode()).hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder.with_suffix(".lock")):
        if not (folder / _COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            log.info("building a virtual environment in %s", folder)
            _create(base, folder, lock)
            storage.write_atomically(folder / _COMPLETE, b"")
    return folder / "bin" / "python"


def describe(python: str, variables: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """What a process in an environment would record: `environment.json`, and the lock.

    Args:
        python: the interpreter.
        variables: the complete environment of the process.

    Raises:
        StokerError: stoker does not start in it.
    """
    said = _run([python, "-P", "-c", _DESCRIBE], "the environment of the lock cannot run stoker", variables)
    found, lock = orjson.loads(said.splitlines()[-1])
    return found, lock


def not_installed(lock: str) -> dict[str, str]:
    """The folders of packages that were imported from a folder, so that pip cannot install them.

    By normalised name, without stoker.
    """
    return {n: p.folder for n, p in differences.locked(lock).items() if p.folder and n != "stoker"}


def _interpreter(version: str) -> str:
    """Raises BadInput."""
    minor = ".".join(version.split(".")[:2])
    if minor == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{minor}")
    if found is None:
        raise BadInput(f"--env: the run used Python {version}, but there is no python{minor}: install it")
    return found


def _create(base: str, folder: Path, lock: str) -> None:
    """Raises StokerError with pip's message."""
    _run([base, "-m", "venv", str(folder)], "the virtual environment cannot be created")
    requirements = folder / "requirements.txt"
    requirements.write_text(lock, encoding="utf-8")
    python = str(folder / "bin" / "python")
    _run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "-r",
            str(requirements),
        ],
        "pip cannot install the run's lock",
    )
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    _link_stoker(Path((machine.output([python, "-c", asked]) or "").strip()))


def _link_stoker(packages: Path) -> None:
    """Link this stoker with its metadata into the environment, unless the lock has one."""
    if (packages / "stoker").exists():
        return
    (packages / "stoker").symlink_to(Path(stoker.__file__).parent)
    about = importlib.metadata.distribution("stoker")._path  # type: ignore[attr-defined]
    (packages / Path(about).name).symlink_to(about)


def _run(command: list[str], failed: str, variables: Mapping[str, str] | None = None) -> str:
    """The standard output of a command. Raises StokerError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise StokerError(f"{failed}:\n{said}")
    return done.stdout
