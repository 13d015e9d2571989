"""`make docs`: the documentation as pages, in build/docs/.

The README, the changelog and what else stands outside of this folder are pages by their own text; the
reference of the command line and of the recipes' keys is written here, from what the program itself says.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx
from stoker import __version__, recipes
from stoker.cli.main import app
from stoker.cli.verbs.recipes import keys
from typer.cli import get_docs_for_click

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "benchmarks.md",
    "examples/own_loop.py": "examples.md",
    "examples/own_loop_plain.py": "examples.md",
    "examples/plateau.py": "examples.md",
}
"""Files outside of this folder, and the pages that show them."""

project = "stoker"
author = "the stoker authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

smartquotes = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "code"  # docstrings have their code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autoclass_content = "both"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "stoker"
html_show_sphinx = False
html_copy_source = False


def _command_line() -> str:
    """Every verb with its arguments and options."""
    command = typer.main.get_command(app())
    _with_whole_sentences(command)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="stoker"), name="stoker")
    return text.replace("# `stoker`", "# Command line", 1)


def _with_whole_sentences(group: Any) -> None:
    """Keep the summaries in a group's list of commands from being cut off."""
    for command in group.commands.values():
        command.short_help = (command.help or "").partition("\n\n")[0]
        if hasattr(command, "commands"):
            _with_whole_sentences(command)


def _recipe(name: str) -> str:
    """What a recipe does, and its keys."""
    found = recipes.load(name)
    about = inspect.getdoc(inspect.getmodule(found.train)) or ""
    rows = [(f"`{key}`", default and f"`{default}`", meaning) for key, default, meaning in keys(found.config)]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    return f"# Recipe: {name}\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n{table}"


def _write(name: str, text: str) -> None:
    page = HERE / "generated" / f"{name}.md"
    page.parent.mkdir(exist_ok=True)
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


_write("cli", _command_line())
for name in recipes.SHIPPED:
    _write(f"recipe-{name}", _recipe(name))


def _with_links_to_pages(text: str, file: Path) -> str:
    """A document with its links, which are made for the repository, leading to pages."""

    def linked(link: re.Match[str]) -> str:
        target = os.path.relpath(file.parent / link[1], ROOT)
        page = PAGES.get(target, target.removeprefix("docs/"))
        return f"]({page}{link[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", linked, text)


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""

    def on_read(app: Sphinx, page: str, source: list[str]) -> None:
        source[0] = _with_links_to_pages(source[0], HERE / f"{page}.md")

    def on_include(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
        source[0] = _with_links_to_pages(source[0], (HERE / path).resolve())

    app.connect("source-read", on_read)
    app.connect("include-read", on_include)
