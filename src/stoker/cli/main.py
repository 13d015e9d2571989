"""`stoker VERB TARGET [key=value ...] [--flags]`: the verbs, and how an error ends a command."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click
import typer
from stoker.cli import recipes, report, resume, runs, sync, train, ui
from stoker.cli.output import print_json
from stoker.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, StokerError

app = typer.Typer(
    name="stoker",
    help="PyTorch training that never loses work, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.add_typer(runs.app, name="runs")
app.command("report")(report.report)
app.add_typer(recipes.app, name="recipes")
app.command("ui")(ui.ui)
app.command("sync")(sync.sync)


def run() -> None:
    """The `stoker` command."""
    sys.exit(_exit_code(app))


def main(train_function: Callable[..., None]) -> None:
    """Make a script with a `train(run, config)` function a command: `python my_train.py lr=3e-4 --name a`."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    script.command()(train.script_command(train_function))
    sys.exit(_exit_code(script))


def _exit_code(command: typer.Typer) -> int:
    """Run a command and turn how it ended into an exit code, with the error said once."""
    try:
        code: Any = command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return _failed(error.format_message(), error.exit_code)
    except StokerError as error:
        sys.stderr.write(f"stoker: error: {error}\n")
        return _failed(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("stoker: interrupted\n")
        return EXIT_INTERRUPTED
    except OSError as error:
        traceback.print_exc()
        if error.errno == errno.ENOSPC:
            sys.stderr.write(
                f"stoker: error: the disk is full ({error}): make room, then run the same command again\n"
            )
        return _failed(str(error), EXIT_FAILED)
    except Exception as error:  # the user's own code, most likely: its whole traceback helps
        traceback.print_exc()
        return _failed(f"{type(error).__name__}: {error}", EXIT_FAILED)
    return code if isinstance(code, int) else 0


def _failed(message: str, code: int) -> int:
    if "--json" in sys.argv:
        print_json({"error": message, "bad_input": code == EXIT_BAD_INPUT, "exit_code": code})
    return code
