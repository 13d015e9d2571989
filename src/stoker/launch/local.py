"""The ranks of a run on this machine, started by torch.distributed.elastic from a warm forkserver.

A rank runs a function and returns an exit code. The signals that stop a run are passed on to the ranks,
which stop after a checkpoint; the launcher waits for them to end. If ranks fail, the first one is reported:
the others only lost their peer. If this process dies, so do the ranks.

Each restart is a new launch with a new store: workers restarted within one launch would find the addresses
of the dead ones in the store they share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from stoker import forkserver, machine, signals
from stoker.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, BadInput, StokerError, Stopped
from stoker.launch import nodes, pulses, ranks
from stoker.launch.budget import Budget, RankFailed
from stoker.launch.rounds import NO_WORK, ONE, Machines, Work
from stoker.launch.watch import Watch, watching
from stoker.run import journal
from stoker.run.directory import RunDirectory
from stoker.signals import STATUS
from stoker.status import PREEMPTED

log = logging.getLogger("stoker")

_POLL = 0.02  # seconds
_STOPPING = 1.0  # seconds for a process to be suspended
_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
_OF_A_RANK = re.compile(r"rank \d+ failed:\nTraceback")
_COMING_UP = 60  # seconds that launchers of several machines have to find each other
PRELOAD = ("stoker.preloaded",)


def run(
    function: Callable[..., int],
    arguments: Sequence[Any],
    *,
    nproc: int,
    preload: Sequence[str] = (),
    max_restarts: int = 0,
    machines: Machines = ONE,
    rendezvous: str = "",
    shared: Path | None = None,
    sizes: frozenset[int] = frozenset([1]),
    work: Work = NO_WORK,
    stopped: Callable[[], None] = lambda: None,
) -> int:
    """Run `function(*arguments)` in `nproc` ranks on each machine; returns the exit code.

    Args:
        function: defined in a module, so that another process can import it; finds its rank with
            `World.current`.
        preload: modules that the ranks' forkserver imports in advance, in addition to torch.
        max_restarts: how often all ranks are started again, see `Budget`, if one is killed, hangs or raises
            anything but a StokerError.
        machines: the number of machines that make this call together.
        sizes: the numbers of machines that can share the work, if it may change.
        rendezvous: HOST:PORT of one of them, where they meet; see `nodes`.
        shared: a folder that all machines must share.
        work: what is trained, which must be the same on all machines.
        stopped: called on the machine where they meet, if the ranks were told to stop and will not be
            started again.

    Raises:
        BadInput: raised by the first rank that failed.
        StokerError: likewise; or RankFailed, for any other failure.
    """
    job = _Job(function, tuple(arguments), nproc, tuple(preload))
    with signals.raised():  # until there are ranks to tell, the launcher ends as they would
        if machines.most == 1:
            return _alone(job, Budget(max_restarts))
        with nodes.seat(rendezvous, nproc, machines, max_restarts, sizes, shared, work) as seat:
            code = _together(job, seat, nodes.parsed(rendezvous)[0])
            if seat.first and code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
                stopped()
            if not (seat.first or seat.leaves):
                log.info("training has ended on all machines with exit code %d", code)
            return code


@dataclass(frozen=True)
class _Job:
    """What the ranks of this machine do."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]
    nproc: int
    preload: tuple[str, ...]


@dataclass(frozen=True)
class Seating:
    """This machine's place in a launch; by default it is the only one."""

    number: int = 0
    machines: int = 1
    host: str = "127.0.0.1"
    """Where the ranks meet."""
    port: int | None = None
    id: str = ""
    seat: nodes.Seat | None = None


def _alone(job: _Job, budget: Budget) -> int:
    """Run everything on the only machine."""
    while True:
        with tempfile.TemporaryDirectory(prefix="stoker-launch-") as folder:
            try:
                return _attempt(job, Seating(), Path(folder))
            except RankFailed as failure:
                budget.spend(failure)
                log.warning("%s\nstarting again; restarts left: %d", failure, budget.left)


def _together(job: _Job, seat: nodes.Seat, host: str) -> int:
    """This machine's part of a launch on several."""
    interface = nodes.interface_towards(host)
    if interface is not None:  # gloo would use the interface of the host's name, which may be the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    attempt: tuple[Path, int] | None = None
    while True:
        with _loss_recorded(attempt, seat):
            begun = seat.next_round()
        attempt = None
        if begun.ended:
            return begun.code
        place = Seating(begun.number, begun.machines, host, begun.port, begun.id, seat)
        with tempfile.TemporaryDirectory(prefix="stoker-launch-") as folder:
            try:
                code = seat.finished(_attempt(job, place, Path(folder)))
            except RankFailed as failure:
                attempt = _newest_attempt(Path(folder))  # before another machine can begin the next
                seat.failed(failure, again=True)
            except StokerError as error:
                if seat.why_over():
                    raise
                seat.failed(error, again=False)
            else:
                if code >= 0:
                    return code


def _attempt(job: _Job, place: Seating, folder: Path) -> int:
    """One launch. Raises the error of the first rank that failed."""

    def outside() -> str:
        if place.seat is None:
            return ""
        place.seat.progress(*_progress(folder))
        if watch.told:
            place.seat.leave()
        watch.ask_to_stop = bool(place.seat.changes())
        return place.seat.why_over()

    with watching(folder, job.nproc, outside) as watch:
        failed = _launch(job, place, folder)
    if watch.told and place.seat is not None:
        place.seat.leave()
    ends = ranks.ends(folder)
    if watch.at_once:
        if len(ends) < job.nproc:
            _tell_run(folder, "told to stop twice, so its ranks were ended at once")
        log.warning("told to stop twice: ending at once; the newest checkpoint remains")
        raise Stopped(STATUS[watch.told])
    early = watch.told and place.seat is not None and not _begun(folder)
    if watch.abandoned and not early:
        return max(end.code or 0 for end in ends.values())
    if said := pulses.refused(folder):
        raise BadInput(said)
    try:
        _raise_first(ends, failed, watch)
    except RankFailed as failure:
        if early:  # those elsewhere may have been told first, and have left these
            raise Stopped(STATUS[watch.told]) from failure
        if watch.told:  # it did end as asked, if not in the intended way
            raise StokerError(str(failure)) from failure
        failure.step, failure.saved = _progress(folder)
        alone = place.seat is None  # of several machines, another one may know what came first
        said = failure.brief or str(failure).partition("\n")[0]
        _tell_run(folder, said, raised=failure.raised and alone)
        raise
    code = _code([end.code or 0 for _, end in sorted(ends.items())])
    if early and code:  # the ranks elsewhere may wait for these for ever
        raise Stopped(STATUS[watch.told])
    return code


def _code(codes: Sequence[int]) -> int:
    """The exit code of ranks that ended as they should: the first one's.

    Of ranks that were interrupted, one may have been told to stop by another signal too on its way out.
    """
    return EXIT_INTERRUPTED if codes[0] and EXIT_INTERRUPTED in codes else codes[0]


def _tell_run(folder: Path, error: str, *, raised: bool = False) -> None:
    """Record in the run's journal why its ranks failed: those that lost a peer only know that."""
    attempt = _newest_attempt(folder)
    if attempt is not None:
        journal.note_failure(*attempt, error, raised=raised)


def _newest_attempt(folder: Path) -> tuple[Path, int] | None:
    """The journal of a launch's run, and its newest attempt; None before there is one."""
    run = pulses.run_of(folder)
    newest = run and journal.newest_attempt(RunDirectory(run).journal)
    return (RunDirectory(run).journal, newest[0]) if run and newest else None


@contextlib.contextmanager
def _loss_recorded(attempt: tuple[Path, int] | None, seat: nodes.Seat) -> Iterator[None]:
    """If an attempt ended because a machine is gone, record that as its end; the others may go on, or not.

    An exception of a rank that lost a peer by it is a consequence, not a failure of training: if everything
    ends, it is not said.
    """
    ended = None
    try:
        yield
    except StokerError as error:
        if error.exit_code == EXIT_PREEMPTED:
            ended, _, rest = str(error).partition("\n")
            ended = ended.removesuffix(".")
            error.args = (ended,) if _OF_A_RANK.match(rest) else error.args
        raise
    finally:
        why = ended or (seat.lost if seat.first else "")  # the machine of rank 0 says it, once
        if attempt is not None and why:
            journal.note_failure(*attempt, why, status=PREEMPTED)


def _progress(folder: Path) -> tuple[int, int]:
    """Steps done, and the step of the newest checkpoint; -1 for none."""
    beats = pulses.read(folder).values()
    return max((p.step for p in beats), default=-1), max((p.saved for p in beats), default=-1)


def _begun(folder: Path) -> bool:
    """Whether a rank has done a step in this launch."""
    return any(pulse.begun for pulse in pulses.read(folder).values())


def _launch(job: _Job, place: Seating, folder: Path) -> dict[int, int]:
    """Start the ranks and wait for them; returns the exit codes of those seen to fail first."""
    forkserver.start(PRELOAD, job.preload)  # it imports torch at the same time as this process
    from stoker.engine import device
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # better messages follow here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=place.machines, max_nodes=place.machines, nproc_per_node=job.nproc,
        run_id=place.id or uuid.uuid4().hex, max_restarts=0, rdzv_backend="static",
        rdzv_endpoint=nodes.written(place.host, place.port or machine.free_port()),  # c10d takes 0.3 s more
        rdzv_configs={"rank": place.number, "timeout": _COMING_UP},
        monitor_interval=_POLL,
        start_method="forkserver", signals_to_handle="SIGQUIT",
    )  # fmt: skip
    try:
        device.check(job.nproc)
        elastic_launch(config, ranks.main)(job.function, job.arguments, str(folder))
    except (Stopped, BadInput):  # before any rank existed
        _end_server()
        raise
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except RuntimeError as error:  # from the store through which the machines find each other
        raise RankFailed(f"the machines did not find each other: {error}") from error
    return {}


def _end_server() -> None:
    """End the ranks' forkserver and the ranks it is starting, before they complain that nobody waits."""
    from multiprocessing.forkserver import _forkserver

    with contextlib.suppress(psutil.NoSuchProcess):
        kill_all_of(psutil.Process(_forkserver._forkserver_pid))  # type: ignore[attr-defined]


def kill_all_of(process: psutil.Process) -> list[psutil.Process]:
    """Kill a process with what it has started, and what it is starting; returns all of them."""
    family = [process]
    for one in family:  # which grows
        family += _children_once_still(one)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return family


def _children_once_still(process: psutil.Process) -> list[psutil.Process]:
    """Suspend a process; returns its children, which are all that there will be."""
    try:
        process.suspend()
        deadline = time.monotonic() + _STOPPING
        while process.status() not in _STILL and time.monotonic() < deadline:
            time.sleep(0.001)  # until then it may start another one
        return process.children()  # type: ignore[no-any-return]
    except psutil.NoSuchProcess:
        return []


def _raise_first(ends: dict[int, ranks.End], failed: dict[int, int], watch: Watch) -> None:
    """Raise the failure of the first rank: a hang, being killed, or an exception."""
    if watch.verdict:
        raise RankFailed(watch.verdict)
    silent = sorted(failed.keys() - ends.keys())  # not those that were ended because another failed
    errors = sorted((end for end in ends.values() if end.error), key=lambda end: end.at)
    if not silent and errors and errors[0].again:
        # Of ranks that are gone when elastic looks, it tells the first, which may only have lost its peer.
        silent = watch.killed()
    if silent:
        code = failed.get(silent[0], -signal.SIGKILL)
        name = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ": it may have run out of memory" if code == -signal.SIGKILL else ""
        raise RankFailed(f"rank {silent[0]} {name}{hint}{_last_output(watch.folder, silent[0])}")
    if errors:
        first = errors[0]
        if not first.again:
            raise (BadInput if first.code == BadInput.exit_code else StokerError)(first.error)
        told = f"rank {first.rank} failed:\n{first.trace.rstrip()}"
        failure = RankFailed(told if first.trace else first.error)
        failure.brief = f"rank {first.rank}: {first.error}"
        failure.exit_code = first.code or failure.exit_code
        failure.raised, failure.at, failure.changed = bool(first.trace), first.at, first.changed
        raise failure
    if not ends or not all(ends[rank].code for rank in failed):
        raise RankFailed(f"ranks could not be started: exit codes {failed}")


def _last_output(folder: Path, rank: int) -> str:
    try:
        lines = (folder / f"rank-{rank}.out").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n" + "\n".join(lines[-20:]) if lines else ""
