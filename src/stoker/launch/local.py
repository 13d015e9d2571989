"""The ranks of a run on this machine, by torch.distributed.elastic, from a warm forkserver.

A rank runs a function and returns an exit code. SIGTERM and Ctrl-C are passed on to the ranks,
which stop after a checkpoint; that they ended is waited for. Of ranks that fail the first is
reported: the others only lost their peer. If this process dies, so do the ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from stoker.errors import BadInput, StokerError, Stopped

_POLL = 0.05  # seconds
_WATCH = 0.2
_LAST_WORDS = 5  # seconds that the other ranks have to end, once one has failed
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)
PRELOAD = ("torch", "torch._dynamo", "stoker.loop")


class RankFailed(StokerError):
    """A rank ended with an exception, or was killed; the message has its traceback."""


@dataclass(frozen=True)
class _End:
    """How a rank ended, as it says itself."""

    rank: int
    at: float
    code: int | None = None
    error: str = ""
    trace: str = ""


def run(
    function: Callable[..., int], arguments: Sequence[Any], *, nproc: int, preload: Sequence[str] = ()
) -> int:
    """Run `function(*arguments)` in `nproc` ranks; returns the exit code of rank 0.

    Args:
        function: of a module, so that another process can import it; finds its rank by `World.current`.
        preload: modules that the server of the ranks imports beforehand, besides torch.

    Raises:
        BadInput: what the first rank to fail raised.
        StokerError: likewise; or RankFailed, for anything else.
    """
    with tempfile.TemporaryDirectory(prefix="stoker-launch-") as name:
        folder = Path(name)
        with _passing_on(folder), _ending_the_rest(folder):
            failed = _launch(function, arguments, nproc, folder, preload)
        ends = {end.rank: end for end in map(_read, sorted(folder.glob("rank-*.json")))}
        _raise_first(ends, failed, folder)
        return ends[0].code or 0


def log_to(file: Path) -> None:
    """From now on this process's standard output and error go to a file, after what they were so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as target:
        os.dup2(target.fileno(), sys.stdout.fileno())
        os.dup2(target.fileno(), sys.stderr.fileno())


def _launch(
    function: Callable[..., int], arguments: Sequence[Any], nproc: int, folder: Path, preload: Sequence[str]
) -> dict[int, int]:
    """Start the ranks and wait for them; returns the exit codes of those that were seen to fail first."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *preload])
    _start_server()  # it imports torch while this process does
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they say is said here better
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=_POLL,
        start_method="forkserver", signals_to_handle="SIGQUIT",
    )  # fmt: skip
    try:
        elastic_launch(config, _rank)(function, tuple(arguments), str(folder), os.getpid())
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def _start_server() -> None:
    """Start the server of the ranks, deaf to signals for the whole process group.

    A scheduler's SIGTERM would end it, and the ranks, which end with their parent, before they
    have taken their checkpoint.
    """
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank(function: Callable[..., int], arguments: Sequence[Any], folder: str, launcher: int) -> None:
    """What each process does."""
    rank = int(os.environ["RANK"])
    base = Path(folder) / f"rank-{rank}"
    os.setsid()  # Ctrl-C reaches the launcher alone, which passes it on once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # its server ignores it
    _end_with(launcher)
    _write(base, ".pid", str(os.getpid()))
    _share_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
    if rank > 0:
        log_to(base.with_suffix(".out"))
    try:
        code, error, trace = function(*arguments), "", ""
    except Stopped as stopped:
        code, error, trace = int(stopped.code or 0), "", ""
    except BaseException as caught:
        code, error, trace = _explained(caught)
    _write(base, ".json", json.dumps(vars(_End(rank, time.time(), code, error, trace))))
    _leave_group(failed=bool(error))
    if error:
        time.sleep(4 * _POLL)  # so that a rank that was killed, and cost this one its peer, is seen first
        os._exit(code or 1)  # at once: a collective of the others may be waiting for this rank


def _explained(caught: BaseException) -> tuple[int, str, str]:
    if isinstance(caught, StokerError):
        return caught.exit_code, str(caught), ""
    return 1, f"{type(caught).__name__}: {caught}", traceback.format_exc()


def _leave_group(*, failed: bool) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if not failed:
        from stoker.engine import distributed

        distributed.leave()


def _share_cores(ranks: int) -> None:
    """Threads of a rank: its share of the cores, unless OMP_NUM_THREADS says."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def _end_with(launcher: int) -> None:
    """End this rank once the launcher is gone. Its parent by process id is the forkserver."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid == launcher

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-launcher", daemon=True).start()


def _write(base: Path, suffix: str, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = base.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(base.with_suffix(suffix))


def _read(file: Path) -> _End:
    return _End(**json.loads(file.read_text(encoding="utf-8")))


def _raise_first(ends: dict[int, _End], failed: dict[int, int], folder: Path) -> None:
    """Raise what the first rank to fail failed of: one that was killed, else the earliest exception."""
    errors = sorted((end for end in ends.values() if end.error), key=lambda end: end.at)
    silent = sorted(failed.keys() - ends.keys())  # not those that were ended for another's failure
    if silent:
        code = failed[silent[0]]
        name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
        hint = ": it may have run out of memory" if code == -signal.SIGKILL else ""
        raise RankFailed(f"rank {silent[0]} was {name}{hint}{_last_output(folder, silent[0])}")
    if errors:
        first = errors[0]
        if not first.trace:
            raise (BadInput if first.code == BadInput.exit_code else StokerError)(first.error)
        raise RankFailed(f"rank {first.rank} failed:\n{first.trace.rstrip()}")
    if failed or 0 not in ends:
        raise RankFailed(f"ranks could not be started: exit codes {failed}")


def _last_output(folder: Path, rank: int) -> str:
    try:
        lines = (folder / f"rank-{rank}.out").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n" + "\n".join(lines[-20:]) if lines else ""


@contextmanager
def _ending_the_rest(folder: Path) -> Iterator[None]:
    """Within this block, once a rank has failed, the others have _LAST_WORDS seconds to end by themselves.

    They are told by SIGTERM, but one that waits in a collective for the rank that is gone hears nothing.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH):
            if any(_has_failed(file) for file in folder.glob("rank-*.pid")):
                over.wait(_LAST_WORDS)
                break
        while not over.is_set():
            _signal(folder, signal.SIGKILL)
            over.wait(_WATCH)

    thread = threading.Thread(target=watch, name="end-the-rest", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _has_failed(file: Path) -> bool:
    """Whether the rank of a pid file has said so, or is gone without a word."""
    said = file.with_suffix(".json")
    if not said.exists() and psutil.pid_exists(int(file.read_text())):
        return False
    return not said.exists() or bool(_read(said).error)


def _signal(folder: Path, number: int) -> None:
    for file in folder.glob("rank-*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), number)


@contextmanager
def _passing_on(folder: Path) -> Iterator[None]:
    """Hand SIGTERM and Ctrl-C to the ranks within this block, and wait on."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not any(folder.glob("rank-*.pid")):
            raise Stopped("interrupted" if number == signal.SIGINT else "preempted")
        _signal(folder, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
