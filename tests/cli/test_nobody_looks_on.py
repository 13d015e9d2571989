"""What is said has no reader any more: a training goes on, or ends as it was told to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView

from support import LONG, SOAK, points, until

SCRIPT = """
import time
import stoker
import torch


def train(run: stoker.Run, config: stoker.Training) -> None:
    trainer = stoker.Trainer(
        run, torch.nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss=lambda output, batch: (output.sum(), len(output)), training=config,
    )
    data = torch.utils.data.TensorDataset(torch.ones(8, 1))
    for batch in trainer.steps(trainer.loader(data, batch_size=4), max_steps=STEPS):
        run.log(loss=trainer.step(batch))
        print("step", run.step, flush=True)
        time.sleep(0.02)
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a training of so many steps, of whose process what it writes to is given.

    It may be started by another command, which is that process then, and belong to the terminal written to.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def run(
        steps: int, *options: str, to: Any, by: tuple[str, ...] = (), in_terminal: bool = False
    ) -> subprocess.Popen[bytes]:
        (tmp_path / "loop.py").write_text(SCRIPT.replace("STEPS", str(steps)))
        command = [*by, sys.executable, "-m", "stoker", "train", "loop.py", "--name", "a", *options]
        processes.append(subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=to, stderr=to, start_new_session=True,
            preexec_fn=_take_terminal if in_terminal else None,  # noqa: PLW1509 - it takes no lock
        ))  # fmt: skip
        return processes[-1]

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _take_terminal() -> None:
    """Make standard output the terminal of this process's session."""
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)


def folded(tmp_path: Path) -> RunView:
    return view.load(RunDirectory(tmp_path / "runs" / "loop" / "a"))


def until_it_trains(tmp_path: Path) -> None:
    until(lambda: points(tmp_path / "runs" / "loop" / "a") >= 3)


@pytest.mark.soak(small=False)
@pytest.mark.parametrize("ranks", [1, 2] if SOAK else [1])
@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 75, "preempted"), *([(signal.SIGINT, 130, "interrupted")] if SOAK else [])],
)
def test_a_signal_that_ends_the_reader_too_leaves_a_checkpoint(
    number: int, code: int, status: str, ranks: int, begin: Callable[..., Any], tmp_path: Path
) -> None:
    """As Ctrl-C does of `stoker train ... | tee log`."""
    reading, writing = os.pipe()
    process = begin(10_000, "--nproc", str(ranks), to=writing)
    os.close(writing)
    until_it_trains(tmp_path)
    os.close(reading)
    os.kill(process.pid, number)
    assert process.wait(LONG) == code
    found = folded(tmp_path)
    assert (found.status, found.checkpoints) == (status, [found.step])


@pytest.mark.parametrize("to", ["a terminal that is closed", "/dev/full"])
def test_it_trains_on_where_nothing_can_be_said(to: str, begin: Callable[..., Any], tmp_path: Path) -> None:
    if to.startswith("/"):
        with Path(to).open("w") as full:
            process = begin(20, to=full)
    else:
        mine, its = os.openpty()
        process = begin(100, to=its)
        os.close(its)
        until_it_trains(tmp_path)
        os.close(mine)
    assert process.wait(LONG) == 0
    assert folded(tmp_path).status == "finished"


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2] if SOAK else [2])
def test_a_shell_whose_terminal_is_closed_leaves_a_checkpoint(
    ranks: int, begin: Callable[..., Any], tmp_path: Path
) -> None:
    """The kernel ends the shell by SIGHUP, and sends it to all processes of the command that it ran."""
    mine, its = os.openpty()
    shell = ("sh", "-c", '"$@"; exit', "sh")
    process = begin(10_000, "--nproc", str(ranks), to=its, by=shell, in_terminal=True)
    os.close(its)
    until_it_trains(tmp_path)
    os.close(mine)
    assert process.wait(LONG) == -signal.SIGHUP
    until(lambda: folded(tmp_path).status != "running")
    found = folded(tmp_path)
    assert (found.status, found.checkpoints) == ("interrupted", [found.step])


@pytest.mark.soak(small=False)
@pytest.mark.parametrize("ranks", [1, 2] if SOAK else [1])
def test_under_nohup_it_trains_on(ranks: int, begin: Callable[..., Any], tmp_path: Path) -> None:
    process = begin(100, "--nproc", str(ranks), to=subprocess.DEVNULL, by=("nohup",))
    until_it_trains(tmp_path)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(LONG) == 0
    assert folded(tmp_path).status == "finished"
