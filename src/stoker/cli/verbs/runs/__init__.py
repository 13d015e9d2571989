"""`stoker runs list|show|compare|export|tag|rm`."""

from __future__ import annotations

import typer
from stoker.cli.verbs.runs.compare import compare
from stoker.cli.verbs.runs.export import export
from stoker.cli.verbs.runs.list import list_
from stoker.cli.verbs.runs.remove import remove
from stoker.cli.verbs.runs.show import show
from stoker.cli.verbs.runs.tag import tag

app = typer.Typer(help="List, show, compare, export, tag and delete runs.", no_args_is_help=True)
app.command("list")(list_)
app.command("show")(show)
app.command("compare")(compare)
app.command("export")(export)
app.command("tag")(tag)
app.command("rm")(remove)
