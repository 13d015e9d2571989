"""What all commands share: the runs folder, and how answers are printed.

With `--json`, a command prints one object last on standard output; progress and warnings always go to
standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from stoker import terminal
from stoker.errors import EXIT_BAD_INPUT
from stoker.run import finding
from stoker.run.messages import ToStderr
from stoker.world import World

log = logging.getLogger("stoker")


def _runs_option(help_: str) -> Any:
    return typer.Option("--runs", envvar="STOKER_RUNS", metavar="DIR", parser=finding.folder, help=help_)


RunsFolder = Annotated[Path, _runs_option("The folder that holds the runs, or s3://bucket/folder.")]
LocalRunsFolder = Annotated[Path, _runs_option("The local folder that holds the sweeps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last on standard output.")]

DEFAULT_RUNS = Path("runs")


def console() -> Console:
    """Standard output for people; without colours or a width limit unless it is a terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def print_json(answer: dict[str, Any]) -> None:
    """Print the object that answers `--json`. NaN and infinities become null."""
    sys.stdout.write(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode() + "\n")
    sys.stdout.flush()


def answer(json: bool, found: dict[str, Any], text: str) -> None:
    """Print an answer: the object with `--json`, else the text."""
    if json:
        print_json(found)
    else:
        console().print(text, markup=False)


def say_error(message: str, code: int) -> None:
    """Report the error that ends a command; with `--json` also as an object with the exit code."""
    is_trace = "\n" in message and code != EXIT_BAD_INPUT
    terminal.say(f"{message}\n" if is_trace else f"stoker: error: {message}\n")
    if "--json" in sys.argv:
        print_json({"error": message, "bad_input": code == EXIT_BAD_INPUT, "exit_code": code})


def show_messages(level: int = logging.INFO) -> None:
    """Write the library's messages to standard error; those of ranks above 0 go only to their logs."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if World.current().rank > 0:  # its messages go to its log file
        log.addHandler(logging.NullHandler())
        return
    if not any(isinstance(handler, ToStderr) for handler in log.handlers):
        log.addHandler(ToStderr(level))


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Within this block, messages go to standard error as those of a command, if logging is not set up."""
    if log.hasHandlers():
        yield
        return
    handler, level = ToStderr(logging.INFO), log.level
    log.addHandler(handler)
    log.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
