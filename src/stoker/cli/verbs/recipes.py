"""`stoker recipes list|show|copy`: recipes, their keys, and shipped configs."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from stoker import config as configs
from stoker import recipes
from stoker.cli.output import Json, answer, console, print_json
from stoker.errors import BadInput, nearest
from stoker.meanings import meanings_of

app = typer.Typer(help="Recipes, their keys, and shipped configs.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the shipped recipes and configs."""
    found = {
        name: (inspect.getdoc(inspect.getmodule(recipes.load(name).train)) or "") for name in recipes.SHIPPED
    }
    for_llm = {name: _about(file) for name, file in recipes.configs().items()}
    if json:
        named = [[{"name": n, "about": about} for n, about in of.items()] for of in (found, for_llm)]
        print_json({"recipes": named[0], "configs": named[1]})
        return
    for name, about in found.items():
        console().print(f"{name:22}{about.splitlines()[0]}", markup=False)
    console().print("\nConfigs, as in `stoker train llm --config NAME`:", markup=False)
    for name, about in for_llm.items():
        console().print(f"{name:22}{about}", markup=False)


def _about(config: Path) -> str:
    return config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


@app.command()
def show(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe or config, or a file with a train(run, config) function.",
        ),
    ],
    json: Json = False,
) -> None:
    """Show a recipe's keys, or a shipped config. Keys have their default and meaning (--json: and type)."""
    shipped = recipes.configs().get(recipe)
    if shipped is not None:
        _show_config(recipe, shipped, json)
        return
    found = recipes.load(recipe)
    if json:
        described, meanings = _described(found.config), meanings_of(found.config)
        print_json({
            "recipe": found.name, "source": str(found.source),
            "keys": {
                key: {"type": kind, "default": default, "meaning": meanings.get(key, "")}
                for key, (kind, default) in described.items()
            },
        })  # fmt: skip
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in keys(found.config):
        table.add_row(*row)
    console().print(table)


def keys(config: type) -> list[tuple[str, str, str]]:
    """The keys of a config, each with its default and meaning; the recipe's own come first."""
    meanings = meanings_of(config)
    described = _described(config)
    return [(key, _short(default), meanings.get(key) or kind) for key, (kind, default) in described.items()]


def _show_config(name: str, file: Path, json: bool) -> None:
    text = file.read_text(encoding="utf-8")
    answer(json, {"config": name, "source": str(file), "values": yaml.safe_load(text)}, text.rstrip())


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or config.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write; default: NAME with its suffix, in this folder."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Copy a recipe's script, or a config, to make it your own."""
    known = {**{n: recipes.load(n).source for n in recipes.SHIPPED}, **recipes.configs()}
    if name not in known:
        raise BadInput(
            f"no recipe or config named {name!r} is shipped{nearest(name, known)}; choose one "
            f"of {', '.join(known)}"
        )
    target = output or Path(f"{name}{known[name].suffix}")
    if target.exists():
        raise BadInput(f"{target} already exists: choose another name with -o")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(known[name], target)
    answer(json, {"copied": name, "to": str(target.absolute())}, str(target))


def _short(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "(required)"
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else str(default.value if isinstance(default, enum.Enum) else default)


def _described(config: type) -> dict[str, tuple[str, Any]]:
    """Type and default of each key: the recipe's own first, then those that it inherits."""
    own = inspect.get_annotations(config)
    keys = configs.describe(config)
    return dict(sorted(keys.items(), key=lambda pair: pair[0].partition(".")[0] not in own))
