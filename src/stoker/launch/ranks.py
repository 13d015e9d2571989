"""What a rank does: run a function, and report how it ended.

The folder of a launch contains for each rank: its process id (`.pid`), its progress (`.pulse`, see
`supervision`), how it ended (`.json`), and for ranks above 0 their output until they had their own log
(`.out`).
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from stoker import machine, redaction, signals, storage, supervision, terminal
from stoker.errors import StokerError, Stopped, stops_as_raised, trace_of
from stoker.launch import pulses
from stoker.supervision import Pulse
from stoker.world import World

_PAUSE = 0.08  # seconds; see `main`


@dataclass(frozen=True)
class End:
    """How a rank ended, as reported by itself."""

    rank: int
    at: float
    code: int | None = None
    error: str = ""
    trace: str = ""
    again: bool = False
    changed: bool = False
    """As in `StokerError`."""


def main(function: Callable[..., int], arguments: Sequence[Any], folder: str) -> None:
    """The main function of each process."""
    rank = int(os.environ["RANK"])
    base = Path(folder) / f"rank-{rank}"
    os.setsid()  # Ctrl-C reaches only the launcher, which passes it on once
    try:
        with stops_as_raised():
            _answer_signals(_stop)
            signals.take()  # its forkserver blocks them
            _come_up(rank, base)
            end = End(rank, time.time(), function(*arguments))
    except Stopped as stopped:  # elastic also does this to the others, once one has failed
        _answer_signals(signal.SIG_IGN)
        error = "ended with the other ranks" if failed(Path(folder)) else ""
        end = End(rank, time.time(), int(stopped.code or 0), error)
    except StokerError as caught:
        code, said = caught.exit_code, redaction.text(str(caught))
        end = End(rank, time.time(), code, said, again=caught.again, changed=caught.changed)
    except BaseException as caught:
        full = storage.said_of_full_disk(caught)
        said = redaction.text(f"{type(caught).__name__}: {caught}")
        trace = redaction.text(trace_of(caught))
        end = End(rank, time.time(), 1, full or said, "" if full else trace, again=not full)
    _answer_signals(signal.SIG_IGN)
    _write(base, ".json", json.dumps(vars(end)))
    _leave_group(failed=bool(end.error))
    if end.error:
        time.sleep(_PAUSE)  # so that a killed rank, which cost this one its peer, is noticed first
        os._exit(end.code or 1)  # immediately: a collective of the others may be waiting for this rank
    if end.code and _leaves_others_waiting(rank, Path(folder)):
        os._exit(end.code)  # after a success, its launcher would wait for the launchers of these


def _come_up(rank: int, base: Path) -> None:
    """Say that this rank is there, and where it can be asked and read."""
    signals.end_with_parent()
    os.environ[supervision.FOLDER] = str(base.parent)
    _write(base, ".pid", str(os.getpid()))
    supervision.write_stacks_to(base.with_suffix(".stacks"))
    machine.share_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
    if rank > 0:
        log_to(base.with_suffix(".out"))
    else:
        terminal.outlive()


def ends(folder: Path) -> dict[int, End]:
    """How the ranks of a launch ended, as far as they could report it."""
    found = (read_end(file) for file in sorted(folder.glob("rank-*.json")))
    return {end.rank: end for end in found}


def read_end(file: Path) -> End:
    """How a rank ended."""
    return End(**json.loads(file.read_text(encoding="utf-8")))


def pids(folder: Path) -> dict[int, int]:
    """The process ids of a launch's ranks."""
    return {_number(file): int(file.read_text()) for file in folder.glob("rank-*.pid")}


def living(folder: Path) -> list[int]:
    """The ranks of a launch that have neither reported an end nor disappeared."""
    return [
        rank
        for rank, pid in pids(folder).items()
        if not (folder / f"rank-{rank}.json").exists() and runs(pid)
    ]


def failed(folder: Path) -> bool:
    """Whether any rank of a launch has reported a failure, or disappeared without a report."""
    return any(_has_failed(folder / f"rank-{rank}.json", pid) for rank, pid in pids(folder).items())


def _leaves_others_waiting(rank: int, folder: Path) -> bool:
    """Whether ranks of other machines may still wait for this one to start, which has done no step."""
    world = World.current()
    return world.size > world.local_size and not pulses.read(folder).get(rank, Pulse()).begun


def _has_failed(said: Path, pid: int) -> bool:
    if not said.exists() and runs(pid):
        return False
    return not said.exists() or bool(read_end(said).error)


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended exists until its parent has asked for its exit code."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def log_to(file: Path) -> None:
    """Append this process's standard output and error to a file, after what they have written so far.

    What Python writes there is without secrets.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as target:
        os.dup2(target.fileno(), sys.stdout.fileno())
        os.dup2(target.fileno(), sys.stderr.fileno())
    if not isinstance(sys.stdout, _WithoutSecrets):
        sys.stdout, sys.stderr = _WithoutSecrets(sys.stdout.fileno()), _WithoutSecrets(sys.stderr.fileno())


class _WithoutSecrets(io.TextIOWrapper):
    """Standard output or error, by its descriptor, without secrets."""

    def __init__(self, descriptor: int) -> None:
        raw: Any = terminal.Outlived(descriptor)
        super().__init__(raw, encoding="utf-8", errors="backslashreplace", write_through=True)

    def write(self, said: str) -> int:
        super().write(redaction.text(said))
        return len(said)


def _answer_signals(handler: Any) -> None:
    for number in signals.heard(signals.STATUS):
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Until a run handles signals, there is nothing to finish."""
    raise Stopped(signals.STATUS[number])


def _leave_group(*, failed: bool) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if not failed:
        from stoker import distributed

        distributed.leave()


def _write(base: Path, suffix: str, text: str) -> None:
    storage.write_atomically(base.with_suffix(suffix), text.encode(), lasts=False, synced=False)


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("rank-"))
