"""A sweep's file of W&B, answered with the command that searches the same here.

https://docs.wandb.ai/guides/sweeps/sweep-config-keys
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from stoker.tune.domains import Number

_SAMPLERS = {"bayes": "gp", "random": "random", "grid": "grid"}
_GOALS = {"minimize": "min", "maximize": "max"}
_LOGARITHMIC = ("log_uniform_values", "q_log_uniform_values")
_EVEN = ("uniform", "q_uniform", "int_uniform")


def is_one(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a sweep of W&B's."""
    return "method" in content and isinstance(content.get("parameters"), Mapping)


def as_command(content: Mapping[str, Any]) -> str:
    """The same search as a command, for any recipe."""
    return shlex.join(["stoker", "sweep", "RECIPE", *_keys(content["parameters"]), *_options(content)])


def _keys(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, given in parameters.items():
        if isinstance(given, Mapping) and isinstance(given.get("parameters"), Mapping):
            yield from _keys(given["parameters"], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_expression(given)}"


def _expression(given: Any) -> str:
    """A domain as it is written here; `...` for one that has no equivalent (normal, and other rare ones)."""
    if not isinstance(given, Mapping):
        return "..."
    if "value" in given:
        return str(given["value"])
    if isinstance(given.get("values"), list):
        return f"[{', '.join(map(str, given['values']))}]"
    return _range(given) or "..."


def _range(given: Mapping[str, Any]) -> str:
    """A range of numbers; empty if it cannot be written here."""
    low, high, step = (given.get(name) for name in ("min", "max", "q"))
    integer = isinstance(low, int) and isinstance(high, int)
    kind = given.get("distribution", "int_uniform" if integer else "uniform")
    log = kind in _LOGARITHMIC
    if low is None or high is None or not (log or kind in _EVEN):
        return ""
    try:
        return str(Number(low, high, integer=kind == "int_uniform", log=log, step=None if log else step))
    except (TypeError, ValueError):  # no numbers, or their steps do not lead from one to the other
        return ""


def _options(content: Mapping[str, Any]) -> Iterator[str]:
    if sampler := _SAMPLERS.get(str(content["method"])):
        yield from ("--sampler", sampler)
    metric = content.get("metric")
    if isinstance(metric, Mapping) and "name" in metric:
        yield from ("--metric", str(metric["name"]))
        if goal := _GOALS.get(str(metric.get("goal"))):
            yield from ("--goal", goal)
    if isinstance(content.get("early_terminate"), Mapping):
        yield from ("--scheduler", "hyperband")
    if "run_cap" in content:
        yield from ("--trials", str(content["run_cap"]))
