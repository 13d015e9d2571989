"""What is installed, compared with the package's own metadata."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

from packaging.requirements import Requirement
from stoker.doctor.findings import Finding, note, ok, problem
from stoker.words import counted

_NAME = "stoker"
_SHOWN = 3  # packages of an extra whose versions are shown


def check() -> Iterator[Finding]:
    """Versions; incompatible packages; the extras."""
    python = f"Python {platform.python_version()} in {sys.prefix}"
    own = version(_NAME)
    if own is None:
        yield problem(f"{python} has no package stoker, so its needs are unknown: pip install stoker")
        return
    yield ok(f"stoker {own}, torch {version('torch') or 'none'}, {python}")
    required = [Requirement(text) for text in importlib.metadata.requires(_NAME) or ()]
    for wanted in itertools.filterfalse(_fits, _with("", required)):
        yield problem(
            f"{_have(wanted)}, but stoker needs {_pip(wanted)}: pip install {shlex.quote(_pip(wanted))}"
        )
    yield from _extras(required)


def version(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except PackageNotFoundError:
        return None


def _extras(required: list[Requirement]) -> Iterator[Finding]:
    always = _with("", required)
    names = importlib.metadata.metadata(_NAME).get_all("Provides-Extra") or []
    wanted = {name: [one for one in _with(name, required) if one not in always] for name in names}
    here = {name: packages for name, packages in wanted.items() if all(map(_fits, packages))}
    if here:
        yield ok(f"extras: {', '.join(_shown(name, packages) for name, packages in here.items())}")
    if missing := [name for name in names if name not in here]:
        why = [_have(one) for name in missing for one in wanted[name] if version(one.name) and not _fits(one)]
        hint = f" ({'; '.join(dict.fromkeys(why))})" if why else ""
        yield note(f"extras not installed: {', '.join(missing)}{hint}; pip install 'stoker[{missing[0]}]'")


def _with(extra: str, required: list[Requirement]) -> list[Requirement]:
    """The requirements that apply on this machine to an extra or, for "", without any."""
    return [one for one in required if one.marker is None or one.marker.evaluate({"extra": extra})]


def _fits(wanted: Requirement) -> bool:
    have = version(wanted.name)
    return have is not None and wanted.specifier.contains(have, prereleases=True)


def _have(wanted: Requirement) -> str:
    have = version(wanted.name)
    return f"{wanted.name} {have}" if have else f"{wanted.name} is not installed"


def _pip(wanted: Requirement) -> str:
    return f"{wanted.name}{wanted.specifier}"


def _shown(extra: str, packages: list[Requirement]) -> str:
    """An extra with its versions: `wandb 0.31.0`, `quantisation (bitsandbytes 0.49.1, torchao 0.14.0)`."""
    if len(packages) > _SHOWN:
        return f"{extra} ({counted(len(packages), 'package')})"
    shown = ", ".join(f"{one.name} {version(one.name)}" for one in packages)
    return shown if shown.startswith(f"{extra} ") else f"{extra} ({shown})"
