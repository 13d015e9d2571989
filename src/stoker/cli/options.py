"""Options that several commands have, and groups of them that are one value."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config values, dotted: lr=3e-4 lora.rank=8"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A YAML file of config values, or the name of a shipped one."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="The run's id; the same command with the same name continues it.", show_default="new"),
]
Experiment = Annotated[
    str | None,
    typer.Option(help="The experiment, a folder that groups runs.", show_default="the recipe's name"),
]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, metavar="N", help="Ranks on this machine.", show_default="1"),
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time", metavar="TIME", help="Save a checkpoint and stop after this time, such as 3h55m."
    ),
]


def grouped(command: Callable[..., int], **others: Any) -> Callable[..., int]:
    """Give a command the options of its groups, in their places.

    A group is a parameter whose type is a dataclass; each of its fields is an option.

    Args:
        others: annotations that replace those of fields; None leaves the option out.
    """
    groups: dict[str, type] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True) | others
        options += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(group)
            if hints[field.name] is not None
        ]  # fmt: skip

    @functools.wraps(command)
    def with_groups(**given: Any) -> int:
        values = {
            name: group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group) if f.name in given})
            for name, group in groups.items()
        }
        return command(**given, **values)

    with_groups.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return with_groups
