"""stoker: PyTorch training that never loses work, from a laptop to a cluster.

Importing this package loads neither torch nor mlflow: the names below are imported at their first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stoker.errors import BadInput, StokerError

if TYPE_CHECKING:
    from stoker.duration import Duration
    from stoker.engine.settings import Training
    from stoker.integrations.sweeping import sweep
    from stoker.run.reading import runs
    from stoker.trainer import Trainer
    from stoker.user_run import Run

__all__ = ["BadInput", "Duration", "Run", "StokerError", "Trainer", "Training", "main", "runs", "sweep"]
__version__ = "0.1.0.dev0"

_LAZY = {
    "Run": "user_run", "Trainer": "trainer", "Training": "engine.settings", "Duration": "duration",
    "sweep": "integrations.sweeping", "runs": "run.reading",
}  # fmt: skip


def main(train: Callable[..., None]) -> None:
    """Make a script with a function `train(run, config)` a command: `python my_train.py lr=3e-4 --name a`."""
    from stoker import signals

    signals.answer_while_starting()  # first, because the following imports take a second
    from stoker.cli import main as command

    command.main(train)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"stoker.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'stoker' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
