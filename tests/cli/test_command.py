"""`stoker` itself: its help, and words that are no command."""

from __future__ import annotations

from importlib import metadata

import pytest
from stoker.cli import main

from commands import Command


@pytest.mark.parametrize(
    ("words", "said"), [((), "Start a run, "), (("runs",), "List runs, the newest last.")]
)
def test_a_group_by_itself_prints_its_help_which_is_no_error(
    words: tuple[str, ...], said: str, stoker: Command
) -> None:
    done = stoker(*words)
    assert done.code == 2
    assert done.err.startswith("Usage: ")
    assert " ".join((*words, "[OPTIONS] COMMAND [ARGS]...")) in done.err
    assert said in done.err


def test_the_help_has_every_command_and_each_has_its_own(stoker: Command) -> None:
    whole = stoker("--help").out
    for name in main.COMMANDS:
        assert f"\n  {name} " in whole
    for page in (whole, *(stoker(name, "--help").out for name in ("runs", "jobs", "checkpoints", "models"))):
        assert "...\n" not in page.partition("Commands:")[2], "no line is cut"
    for name in ("runs", "train"):
        assert f" {name} [OPTIONS] " in stoker(name, "--help").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "No such command 'trian'. Did you mean 'train'?"),
        (("runs", "lst"), "No such command 'lst'. Did you mean 'list'?"),
        (("--nproc", "2"), "No such option: --nproc"),
        (("reproduce", "a", "--name", "b"), "No such option: --name"),  # which is not a key either
    ],
)
def test_a_word_that_is_no_command_is_said(words: tuple[str, ...], said: str, stoker: Command) -> None:
    done = stoker(*words)
    assert (done.code, done.err) == (2, f"stoker: error: {said}\n")


def test_of_a_missing_argument_it_is_said_where_to_read_about_it(stoker: Command) -> None:
    done = stoker("train")
    assert done.code == 2
    assert done.err.startswith("stoker: error: Missing argument 'RECIPE': see `")
    assert done.err.endswith(" train --help`\n")


def test_it_says_its_version(stoker: Command) -> None:
    done = stoker("--version")
    assert (done.code, done.out) == (0, f"stoker {metadata.version('stoker')}\n")
