"""`stoker recipes list|show`: what can be trained, and the keys it takes."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from stoker import config as configs
from stoker import recipes
from stoker.cli.output import Json, console, print_json

app = typer.Typer(help="What can be trained, and the keys it takes.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the shipped recipes."""
    found = {
        name: (inspect.getdoc(inspect.getmodule(recipes.load(name).train)) or "") for name in recipes.SHIPPED
    }
    if json:
        print_json({"recipes": [{"name": name, "about": about} for name, about in found.items()]})
        return
    for name, about in found.items():
        console().print(f"{name:8} {about.splitlines()[0]}")


@app.command()
def show(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A shipped recipe, or a file with a train(run, config) function."
        ),
    ],
    json: Json = False,
) -> None:
    """Show the keys of a recipe: name, type, default and meaning."""
    found = recipes.load(recipe)
    keys = configs.describe(found.config)
    meanings = _meanings(found.config)
    if json:
        print_json({
            "recipe": found.name, "source": str(found.source),
            "keys": {
                key: {"type": kind, "default": default, "meaning": meanings.get(key, "")}
                for key, (kind, default) in keys.items()
            },
        })  # fmt: skip
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for key, (kind, default) in keys.items():
        table.add_row(key, _short(default), meanings.get(key) or kind)
    console().print(table)


def _short(default: Any) -> str:
    return "" if default is None else str(default)


def _meanings(cls: type, prefix: str = "") -> dict[str, str]:
    """The docstring under each field of a config, by dotted key, read from its source."""
    module = ast.parse(Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(module) if isinstance(node, ast.ClassDef)}
    return _of_class(classes, cls.__name__, prefix)


def _of_class(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    body = classes[name].body if name in classes else []
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        key = prefix + statement.target.id
        if isinstance(statement.annotation, ast.Name) and statement.annotation.id in classes:
            found.update(_of_class(classes, statement.annotation.id, f"{key}."))
        elif isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[key] = " ".join(str(after.value.value).split())
    return found
