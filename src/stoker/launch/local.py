"""The ranks of a run on this machine, by torch.distributed.elastic, from a warm forkserver.

A rank runs a function and returns an exit code. SIGTERM, SIGUSR1 and Ctrl-C are passed on to the
ranks, which stop after a checkpoint; that they ended is waited for. Of ranks that fail the first is
reported: the others only lost their peer. If this process dies, so do the ranks.

Each restart is a launch of its own with a store of its own: workers that are restarted within one
launch find the addresses of those that died in the store they share.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stoker import signals, supervision
from stoker.errors import BadInput, StokerError
from stoker.launch import ranks
from stoker.launch.watch import Watch, watching

log = logging.getLogger("stoker")

_POLL = 0.02  # seconds
PRELOAD = ("torch", "torch._dynamo", "stoker.loop")


class RankFailed(StokerError):
    """A rank ended with an exception, was killed, or hangs; the message has its traceback."""

    step = -1
    """How many steps were done."""
    saved = -1
    """The step of the newest checkpoint on disk then."""
    raised = False
    """Whether it was an exception of the code, and not the end of a process or a standstill."""


class Budget:
    """How many restarts are left: as many as at first, whenever a checkpoint was taken since the last."""

    def __init__(self, restarts: int) -> None:
        self._whole = self.left = restarts
        self._before: RankFailed | None = None

    def spend(self, failure: RankFailed) -> None:
        """Take one for a failure. Raises it where none is left, or where the same happens again."""
        before, self._before = self._before, failure
        if before is not None and failure.saved > before.saved:
            self.left = self._whole
        if before is not None and before.raised and failure.raised and before.step == failure.step:
            raise RankFailed(
                f"it fails at step {failure.step + 1} every time, so it is not started again.\n"
                f"The first time {before}\nThe second time {failure}"
            )
        if self.left == 0:
            raise failure
        self.left -= 1


def run(
    function: Callable[..., int],
    arguments: Sequence[Any],
    *,
    nproc: int,
    preload: Sequence[str] = (),
    max_restarts: int = 0,
) -> int:
    """Run `function(*arguments)` in `nproc` ranks; returns the exit code of rank 0.

    Args:
        function: of a module, so that another process can import it; finds its rank by `World.current`.
        preload: modules that the server of the ranks imports beforehand, besides torch.
        max_restarts: how often all ranks are started again, see `Budget`, where one was killed, hangs or
            raised anything but a StokerError.

    Raises:
        BadInput: what the first rank to fail raised.
        StokerError: likewise; or RankFailed, for anything else.
    """
    budget = Budget(max_restarts)
    while True:
        with tempfile.TemporaryDirectory(prefix="stoker-launch-") as folder:
            try:
                return _attempt(function, arguments, nproc, Path(folder), preload)
            except RankFailed as failure:
                budget.spend(failure)
                log.warning("%s\nstarting again; restarts left: %d", failure, budget.left)


def _attempt(
    function: Callable[..., int], arguments: Sequence[Any], nproc: int, folder: Path, preload: Sequence[str]
) -> int:
    """One launch. Raises what the first rank to fail failed of."""
    with watching(folder, nproc) as watch:
        failed = _launch(function, arguments, nproc, folder, preload)
    ends = ranks.ends(folder)
    try:
        _raise_first(ends, failed, watch)
    except RankFailed as failure:
        if watch.told_to_stop:  # as it was asked to, if not in the way it was
            raise StokerError(str(failure)) from failure
        pulses = supervision.read(folder).values()
        failure.step = max((p.step for p in pulses), default=-1)
        failure.saved = max((p.saved for p in pulses), default=-1)
        raise
    return ends[0].code or 0


def _launch(
    function: Callable[..., int], arguments: Sequence[Any], nproc: int, folder: Path, preload: Sequence[str]
) -> dict[int, int]:
    """Start the ranks and wait for them; returns the exit codes of those that were seen to fail first."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *preload])
    with signals.ignored_by_what_starts_here():
        forkserver.ensure_running()  # it imports torch while this process does
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they say is said here better
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{_free_port()}", rdzv_configs={"rank": 0},
        monitor_interval=_POLL,
        start_method="forkserver", signals_to_handle="SIGQUIT",
    )  # fmt: skip
    try:
        elastic_launch(config, ranks.main)(function, tuple(arguments), str(folder), os.getpid())
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def _free_port() -> int:
    """A port for the store of a launch. The c10d rendezvous would take one itself, up to 0.3 s later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _raise_first(ends: dict[int, ranks.End], failed: dict[int, int], watch: Watch) -> None:
    """Raise what the first rank to fail failed of: standing still, being killed, an exception."""
    if watch.verdict:
        raise RankFailed(watch.verdict)
    silent = sorted(failed.keys() - ends.keys())  # not those that were ended for another's failure
    if silent:
        code = failed[silent[0]]
        name = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
        hint = ": it may have run out of memory" if code == -signal.SIGKILL else ""
        raise RankFailed(f"rank {silent[0]} was {name}{hint}{_last_output(watch.folder, silent[0])}")
    errors = sorted((end for end in ends.values() if end.error), key=lambda end: end.at)
    if errors:
        first = errors[0]
        if not first.again:
            raise (BadInput if first.code == BadInput.exit_code else StokerError)(first.error)
        told = f"rank {first.rank} failed:\n{first.trace.rstrip()}"
        failure = RankFailed(told if first.trace else first.error)
        failure.raised = True
        raise failure
    if failed or 0 not in ends:
        raise RankFailed(f"ranks could not be started: exit codes {failed}")


def _last_output(folder: Path, rank: int) -> str:
    try:
        lines = (folder / f"rank-{rank}.out").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n" + "\n".join(lines[-20:]) if lines else ""
