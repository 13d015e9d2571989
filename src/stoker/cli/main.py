"""`stoker VERB TARGET [key=value ...] [--flags]`: the commands, and how errors are reported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import typer
from stoker import other_names, storage, terminal, threads
from stoker.cli import (
    bench,
    checkpoints,
    data,
    diff,
    doctor,
    evaluate,
    generate,
    jobs,
    models,
    package,
    plan,
    recipes,
    report,
    reproduce,
    resume,
    runs,
    sweep,
    sync,
    train,
    ui,
)
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
_MISSPELT = 0.75  # least similarity at which an option counts as misspelt
_OUTLIVE = ("train", "resume", "reproduce", "sweep", "bench")  # these go on when the terminal is closed
_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="stoker",
    help="PyTorch training that never loses work, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_HELP,
)
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("sweep")(sweep.sweep)
app.add_typer(runs.app, name="runs")
app.add_typer(jobs.app, name="jobs")
app.command("reproduce")(reproduce.reproduce)
app.command("plan")(plan.plan)
app.command("diff")(diff.diff)
app.command("package")(package.package)
app.command("report")(report.report)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(models.app, name="models")
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")
app.command("ui")(ui.ui)
app.command("sync")(sync.sync)
app.command("doctor")(doctor.doctor)


def run() -> None:
    """The `stoker` command."""
    if sys.argv[1:2] and sys.argv[1] in _OUTLIVE:
        terminal.outlive()
    threads.end_process(_exit_code(app))


def main(train_function: Callable[..., None]) -> None:
    """Make a command of a script with `train(run, config)`: `python my_train.py lr=3e-4 --name a`."""
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
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _in_a_line(error: Exception) -> str:
    """The last line of a traceback; a loader worker's error carries its own traceback in the message."""
    lines, name = str(error).strip().splitlines() or [""], type(error).__name__
    if "Original Traceback" not in str(error):
        return f"{name}: {lines[0]}"
    return next((line for line in reversed(lines) if name in line.partition(":")[0]), lines[-1])


def _key_as_option(error: typer.TyperException, words: Sequence[str]) -> str:
    """The message for a config key given as an option (`--lr 0.1`); empty for any other mistake."""
    option, context = getattr(error, "option_name", ""), getattr(error, "ctx", None)
    if not error.format_message().startswith(_NO_SUCH) or context is None:
        return ""
    parameters = context.command.params
    takes_keys = any("[KEY=" in str(parameter.metavar) for parameter in parameters)
    known = [name for parameter in parameters for name in parameter.opts]
    if not takes_keys or nearest(option, known, alike=_MISSPELT):
        return ""
    key = option.removeprefix("--").replace("-", "_")
    if other := other_names.command_for(key):
        return f"{_NO_SUCH}: {option}; {other}"
    value = arguments.value(words, option)
    is_value = value and not value.startswith("--") and "=" not in value
    return f"{_NO_SUCH}: {option}; write {key}={value}" if is_value else ""


def _failed(error: Exception) -> int:
    """Report an error: one line if the user can act on it, otherwise a traceback; returns the exit code."""
    message, code = str(error), EXIT_FAILED
    if isinstance(error, StokerError):
        code = error.exit_code
    elif isinstance(error, typer.TyperException):  # an option or argument that the command does not take
        said = _key_as_option(error, sys.argv[1:]) or error.format_message()
        message, code = said.replace(": Value error, ", ": "), EXIT_BAD_INPUT
    elif full := storage.said_of_full_disk(error):
        message = full
    else:
        terminal.say(trace_of(error))
        message = _in_a_line(error)
    say_error(message, code)
    return code
