"""A command that is told to stop before it has begun, or after it has done its work."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from commands import Command

RECIPE = str(Path(__file__).parent / "searched.py")

# Where a command asks something slow, it is told, and would wait for ever.
_TOLD = """
import os, time
from {module} import {owner}

def told(*given, **named):
    os.kill(os.getpid(), {number})
    time.sleep(600)

{owner}.{function} = told
"""


def _told(number: int, module: str, owner: str, function: str) -> str:
    return _TOLD.format(number=int(number), module=module, owner=owner, function=function)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_finished_run_that_waits_for_its_trackers_says_how_it_ended(
    stoker: Command, number: signal.Signals
) -> None:
    first = _told(number, "stoker.attempt", "Attempt", "wait_for_sinks")
    done = stoker("train", RECIPE, "steps=3", "--json", first=first)
    assert (done.code, done.answer["status"], done.answer["step"]) == (0, "finished", 3), done.err


def test_so_does_a_search(stoker: Command) -> None:
    first = _told(signal.SIGTERM, "stoker.tracking.shipping", "SweepShipping", "wait")
    done = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1", "--json", first=first)
    assert (done.code, done.answer["over"]) == (0, True), done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_reproduction_that_is_not_compared_is_named(
    stoker: Command, number: signal.Signals, code: int
) -> None:
    assert stoker("train", RECIPE, "steps=3", "--name", "a").code == 0
    first = _told(number, "stoker.reproduce", "journals", "compare")
    done = stoker("reproduce", "a", "--json", first=first)
    assert (done.code, done.answer["identical"], done.answer["status"]) == (code, None, "finished"), done.err
    assert done.answer["again"].endswith("a-again")


def test_interrupted_while_it_is_imported_it_says_so(stoker: Command) -> None:
    first = "import importlib, os; importlib.import_module = lambda name: os.kill(os.getpid(), 2)"
    done = stoker("runs", "list", first=first)
    assert (done.code, done.err) == (130, "stoker: interrupted\n")
