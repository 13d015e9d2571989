"""The house holds: lower never imports higher, rooms of one floor do not know each other, and
the light parts load no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import stoker

PACKAGE = Path(stoker.__file__).parent

# From the ground up; see docs/architecture.md.
FLOORS = (
    {
        "config",
        "storage",
        "world",
        "errors",
        "status",
        "redaction",
        "duration",
        "machine",
        "distributed",
        "signals",
        "forkserver",
        "supervision",
        "threads",
        "object_store",
        "store_urls",
        "periodic",
        "disk",
        "words",
        "terminal",
        "tensors",
        "meanings",
        "other_names",
        "unknown_keys",
        "ray_cluster",
    },
    {"run"},
    {"engine", "data", "checkpoint", "tracking", "reproduce", "stopping", "progress"},
    {"attempt", "model_state"},
    {"user_run", "saving", "evaluation", "exports", "gauge", "loops"},
    {"guard"},
    {"trainer"},
    {"language", "preloaded"},
    {"recipes", "report", "launch", "tune"},
    {"doctor"},
    {"cli"},
    {"integrations"},
)
# Modules of one floor that may import each other: the words that all others are made of.
GROUND = FLOORS[0]
LIGHT = (
    "stoker", "stoker.user_run", "stoker.cli.main; stoker.cli.main.app()", "stoker.run.reading",
    "stoker.tracking.follower", "stoker.tracking.sweep_follower", "stoker.report.html",
)  # fmt: skip
HEAVY = {"torch", "transformers", "mlflow", "datasets", "peft", "plotly", "pyarrow", "sklearn"}


def _room(module: str) -> str:
    return module.split(".")[1]


def _floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _imports(file: Path) -> set[str]:
    """Every module of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return {name for name in found if name.startswith("stoker.") and _room(name) in _rooms()}


def _rooms() -> set[str]:
    return {p.stem for p in PACKAGE.iterdir() if p.stem not in ("__init__", "__main__", "__pycache__", "py")}


def _files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem in _rooms()]


def test_no_two_files_of_tests_have_one_name() -> None:
    """They are imported by it."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_every_room_stands_on_a_floor() -> None:
    assert _rooms() == set().union(*FLOORS)


@pytest.mark.parametrize("file", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_never_imports_higher_and_rooms_of_a_floor_stay_apart(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in _imports(file):
        other = _room(imported)
        allowed = other == room or _floor(other) < _floor(room) or {room, other} <= GROUND
        assert allowed, f"{room} may not import {imported}"


def test_light_parts_load_nothing_heavy() -> None:
    code = f"""
import sys
for part in {LIGHT!r}:
    exec(f"import {{part}}")
    print(part, *({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(LIGHT)


COMMANDS = ("--help", "train --help", "runs list", "jobs list", "recipes show llm")


def test_light_commands_load_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import atexit, os, sys
from stoker.cli.main import run
for command in {COMMANDS!r}:
    if os.fork() == 0:  # as a process that has imported no other command
        atexit.register(lambda: print("\\n:", command, *({HEAVY!r} & set(sys.modules))))
        sys.argv = ["stoker", *command.split()]
        sys.exit(run())
    assert os.wait()[1] == 0, command
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix(": ") for line in done.stdout.splitlines() if line.startswith(": ")]
    assert said == list(COMMANDS)
