"""The sinks: which of them STOKER_SINKS names, whether they are there, and how each is opened."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable

from stoker.errors import BadInput, nearest
from stoker.run.directory import RunDirectory
from stoker.tracking import store
from stoker.tracking.sink import Sink

log = logging.getLogger(__name__)

_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


def enabled() -> tuple[str, ...]:
    """The sinks named in STOKER_SINKS: `mlflow` by default, no sinks for `none`; not W&B if it is disabled.

    Raises BadInput for a sink that is unknown or not installed.
    """
    names = named()
    for name in names:
        check(name)
    return tuple(name for name in names if name != "wandb" or _disabling_wandb() is None)


def say_what_is_disabled() -> None:
    """Say so if a sink that STOKER_SINKS names is disabled."""
    setting = _disabling_wandb()
    if setting is not None and "wandb" in named():
        log.warning("%s: nothing goes to W&B; `stoker sync` without it ships the run later", setting)


def _disabling_wandb() -> str | None:
    """The environment's setting that disables W&B, if there is one."""
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":
        return "WANDB_MODE=disabled"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    return None


def named() -> tuple[str, ...]:
    """Like `enabled`, without checking that the sinks exist."""
    names = (name.strip() for name in os.environ.get("STOKER_SINKS", "mlflow").split(","))
    return tuple(dict.fromkeys(name for name in names if name not in ("none", "")))


def check(name: str) -> None:
    """Raises BadInput for a sink that is unknown or not installed."""
    if name not in SINKS:
        hint = nearest(name, SINKS)
        raise BadInput(f"STOKER_SINKS names {name!r}{hint}; use {', '.join(SINKS)}, or none")
    if importlib.util.find_spec(name) is None:
        raise BadInput(f"STOKER_SINKS names {name}, which is not installed: pip install 'stoker[{name}]'")
    asked = os.environ.get("WANDB_MODE", "")
    if name == "wandb" and asked and asked.lower() not in _WANDB_MODES:
        raise BadInput(f"WANDB_MODE={asked}{nearest(asked, _WANDB_MODES)}; use {', '.join(_WANDB_MODES)}")


def _mlflow(directory: RunDirectory) -> Sink:
    for name, value in {**store.QUIET, **store.IMPATIENT}.items():
        os.environ.setdefault(name, value)
    from stoker.tracking.mlflow_sink import MlflowSink

    return MlflowSink(directory)


def _wandb(directory: RunDirectory) -> Sink:
    from stoker.tracking.wandb_sink import WandbSink

    return WandbSink(directory)


def _tensorboard(directory: RunDirectory) -> Sink:
    from stoker.tracking.tensorboard_sink import TensorBoardSink

    return TensorBoardSink(directory)


def _tracking_store(directory: RunDirectory) -> str:
    return store.without_credentials(store.server_uri() or store.embedded_uri(directory.runs))


SINKS: dict[str, Callable[[RunDirectory], Sink]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
"""What opens a run in a sink, which is imported then."""
WHERE: dict[str, Callable[[RunDirectory], str]] = {
    "mlflow": _tracking_store,
    "wandb": lambda directory: str(directory.path / "wandb"),
    "tensorboard": lambda directory: str(directory.path / "tensorboard"),
}
"""The store and the run in it, before the sink was opened."""
