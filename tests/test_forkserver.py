"""What the server of ranks and trials imports in advance."""

from __future__ import annotations

import subprocess
import sys

import pytest
from stoker import forkserver, machine

from support import LONG

_IMPORTED = """
import importlib, torch
from stoker import forkserver, machine, recipes
from stoker.launch import local as launch
from stoker.tune import local as tune

machine.visible_gpus = lambda: ["0"]
others = ["bitsandbytes", "json", "my_models"]
for recipe in recipes.SHIPPED:
    others += recipes.load(recipe).preload

def looked(*_):
    raise SystemExit(f"{name} has looked for GPUs")

for function in ("is_available", "get_device_capability", "init", "_lazy_init"):
    setattr(torch.cuda, function, looked)
for name in (*forkserver.harmless(others), *launch.PRELOAD, *tune.PRELOAD, "stoker.data.loader"):
    importlib.import_module(name)
    print(name)
"""


def test_where_there_are_gpus_nothing_is_imported_that_looks_for_them() -> None:
    """Processes forked after that could not use them; here torchao and bitsandbytes would look."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED], check=False, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert imported >= {"stoker.preloaded", "stoker.cli.trial", "json"}
    assert not imported & {"bitsandbytes", "my_models"}


def test_without_gpus_all_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", list)
    assert forkserver.harmless(["peft", "my_models"]) == ["peft", "my_models"]
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0"])
    assert forkserver.harmless(["my_models", "numpy"]) == ["numpy"]
