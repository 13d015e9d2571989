"""What every verb shares: where runs stand, and how an answer is printed.

With `--json` a verb prints one object on standard output, last; progress and warnings go to
standard error always.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from stoker import object_store, terminal
from stoker.errors import EXIT_BAD_INPUT
from stoker.run import finding
from stoker.world import World

log = logging.getLogger("stoker")


def _runs_option(help_: str) -> Any:
    return typer.Option("--runs", envvar="STOKER_RUNS", metavar="DIR", parser=finding.folder, help=help_)


RunsFolder = Annotated[Path, _runs_option("The folder that runs stand under, or s3://bucket/folder.")]
LocalRunsFolder = Annotated[Path, _runs_option("The folder that sweeps stand under; a local one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, last.")]

DEFAULT_RUNS = Path("runs")


def console() -> Console:
    """Standard output for people; without colours or a width limit where it is not a terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def runs_option(runs: Path) -> str:
    """What a command needs to look in a runs folder, ` --runs DIR`; empty where it does so by itself."""
    usual = finding.folder(os.environ.get("STOKER_RUNS") or DEFAULT_RUNS)
    if runs.resolve() == usual.resolve():
        return ""
    store = object_store.of(runs)
    return f" --runs {shlex.quote(store.url if store is not None else str(runs))}"


def print_json(answer: dict[str, Any]) -> None:
    """Print the one object of a `--json` answer. NaN and infinities become null."""
    sys.stdout.write(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode() + "\n")
    sys.stdout.flush()


def say_error(message: str, code: int) -> None:
    """Say the error that a command ends with, and its exit code."""
    is_trace = "\n" in message and code != EXIT_BAD_INPUT
    terminal.say(f"{message}\n" if is_trace else f"stoker: error: {message}\n")
    if "--json" in sys.argv:
        print_json({"error": message, "bad_input": code == EXIT_BAD_INPUT, "exit_code": code})


class _StderrHandler(logging.Handler):
    """Writes to what standard error is now: a progress bar puts itself in its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "stoker: " if record.levelno < logging.WARNING else f"stoker: {record.levelname.lower()}: "
        terminal.say(f"{prefix}{record.getMessage()}\n")


def show_messages(level: int = logging.INFO) -> None:
    """Write the library's messages to standard error, of ranks above 0 to their logs alone."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if World.current().rank > 0:  # its messages go to its log file
        log.addHandler(logging.NullHandler())
        return
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler(level))
