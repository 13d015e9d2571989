"""`stoker VERB TARGET [key=value ...] [--flags]`: the commands, and how errors are reported."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from stoker import __version__, other_names, signals, storage, terminal, threads
from stoker.cli.output import say_error
from stoker.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    StokerError,
    nearest,
    stops_as_raised,
    trace_of,
)
from stoker.launch import arguments

_NO_SUCH = "No such option"  # how typer's error for an unknown option begins
_MISSING = "Missing argument"
_NO_WORDS = "NoArgsIsHelpError"  # typer's error, which it does not export, of a group called by itself
_NAME = "--name"  # an option of most commands that take keys, and no key
_MISSPELT = 0.75  # least similarity at which an option counts as misspelt
_OUTLIVE = ("train", "resume", "reproduce", "sweep", "bench")  # these go on when the terminal is closed
_HELP = {"help_option_names": ["-h", "--help"]}

COMMANDS = (
    "train", "resume", "sweep", "runs", "jobs", "reproduce", "plan", "diff", "package", "report", "evaluate",
    "generate", "data", "checkpoints", "models", "recipes", "bench", "ui", "sync", "doctor",
)  # fmt: skip
"""The modules of the commands, in the order of the help."""


def app(only: str | None = None) -> typer.Typer:
    """The `stoker` command; only as much of it as runs one of its commands, if `only` is the name of one."""
    found = typer.Typer(
        name="stoker",
        help="PyTorch training that never loses work, from a laptop to a cluster.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=_HELP,
    )
    found.callback()(_together)
    for name in (only,) if only in COMMANDS else COMMANDS:
        module = importlib.import_module(f"stoker.cli.verbs.{name}")
        if hasattr(module, "app"):
            found.add_typer(module.app, name=name)
        else:
            found.command(name)(getattr(module, name))
    return found


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stoker {__version__}")
        raise typer.Exit


def _together(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """The options of `stoker` itself; with it, typer expects a command's name even if it knows only one."""


def run() -> None:
    """The `stoker` command."""
    first = next(iter(sys.argv[1:]), None)
    if first in _OUTLIVE:
        terminal.outlive()
    threads.end_process(_exit_code(app(first)))


def main(train_function: Callable[..., None]) -> None:
    """Make a command of a script with `train(run, config)`: `python my_train.py lr=3e-4 --name a`."""
    from stoker.cli.verbs import train
    from stoker.run import opening

    opening.refuse_in_import()
    script = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings=_HELP,
    )  # fmt: skip
    script.command()(train.script_command(train_function))
    terminal.outlive()
    threads.end_process(_exit_code(script))


def _exit_code(command: typer.Typer) -> int:
    """Run a command; reports its error, if any, and returns the exit code."""
    sys.stdout, sys.stderr = sys.stdout or terminal.open_nowhere(), sys.stderr or terminal.open_nowhere()
    try:
        with stops_as_raised():
            code: Any = command(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        terminal.say("stoker: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `stoker runs export RUN | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        return _failed(error)
    finally:
        _keep_exit_code()
    return code if isinstance(code, int) else 0


def _keep_exit_code() -> None:
    """Ignore further signals, so that a scheduler's next one cannot change the exit code."""
    if threading.current_thread() is threading.main_thread():
        for number in signals.STATUS:
            signal.signal(number, signal.SIG_IGN)


def _in_a_line(error: Exception) -> str:
    """The last line of a traceback; a loader worker's error carries its own traceback in the message."""
    lines, name = str(error).strip().splitlines() or [""], type(error).__name__
    if "Original Traceback" not in str(error):
        return f"{name}: {lines[0]}"
    return next((line for line in reversed(lines) if name in line.partition(":")[0]), lines[-1])


def _key_as_option(error: typer.TyperException, words: Sequence[str]) -> str:
    """The message for a config key given as an option (`--lr 0.1`), or for another tool's option.

    Empty for any other mistake.
    """
    option, context = getattr(error, "option_name", ""), getattr(error, "ctx", None)
    if not error.format_message().startswith(_NO_SUCH) or context is None:
        return ""
    parameters = context.command.params
    takes_keys = any("[KEY=" in str(parameter.metavar) for parameter in parameters)
    known = [name for parameter in parameters for name in parameter.opts]
    if not takes_keys or option == _NAME:
        return ""
    key = option.removeprefix("--").replace("-", "_")
    if context.command.name == "sweep" and (ours := other_names.option_of_search(key)):
        return f"{_NO_SUCH}: {option}; use {ours}"
    if nearest(option, known, alike=_MISSPELT):
        return ""
    if other := other_names.command_for(key):
        return f"{_NO_SUCH}: {option}; {other}"
    value = arguments.value(words, option)
    is_value = value and not value.startswith("--") and "=" not in value
    return f"{_NO_SUCH}: {option}; write {key}={value}" if is_value else ""


def _with_way_to_help(error: typer.TyperException) -> str:
    """The message for a mistake; of a missing argument, also where to read what it is."""
    said, context = error.format_message(), getattr(error, "ctx", None)
    if not said.startswith(_MISSING) or context is None:
        return said
    return f"{said.rstrip('.')}: see `{context.command_path} --help`"


def _failed(error: Exception) -> int:
    """Report an error: one line if the user can act on it, otherwise a traceback; returns the exit code."""
    message, code = str(error), EXIT_FAILED
    if type(error).__name__ == _NO_WORDS:
        terminal.say(f"{error.format_message()}\n")  # type: ignore[attr-defined]
        return EXIT_BAD_INPUT
    if isinstance(error, StokerError):
        code = error.exit_code
    elif isinstance(error, typer.TyperException):  # an option or argument that the command does not take
        said = _key_as_option(error, sys.argv[1:]) or _with_way_to_help(error)
        message, code = said.replace(": Value error, ", ": "), EXIT_BAD_INPUT
    elif full := storage.said_of_full_disk(error):
        message = full
    else:
        terminal.say(trace_of(error))
        message = _in_a_line(error)
    say_error(message, code)
    return code
