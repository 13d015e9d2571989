"""Runs the processes of trials on this machine, forked from a server that has imported what they need.

Each trial has its own processes, one per rank, so that its memory is freed and a crash affects no other
trial. On request, a process trains one trial after another as long as its memory does not grow. If the
controller dies, its processes end too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil
from stoker import disk, forkserver, machine, redaction, signals, storage
from stoker.errors import BadInput, StokerError, Stopped, trace_of
from stoker.status import FINISHED, PAUSED, STOPPED
from stoker.tune.trial import Began, Ended, Link, Report, TrialJob

PRELOAD = ("stoker.cli.trial", "stoker.preloaded")
_GROWN = 1.25
"""A process trains another trial only while its memory is below this multiple of that at its start."""
_AHEAD = 2
"""Trials queued in a process behind its current one, so that it never waits for the controller."""
_SHORT = 1.0
"""A trial is queued only behind trials shorter than this many seconds, as it cannot start elsewhere."""
_GOES_ON = (FINISHED, STOPPED, PAUSED)
"""The statuses after which a process may train another trial: after others, it failed or was told to end."""
_CONTEXT = multiprocessing.get_context("forkserver")
_SCRIPT = threading.Lock()

Function = Callable[[TrialJob, Link], dict[str, Any]]
"""What each process of a trial executes, pickled by its name: trains, and returns the run's `status`, the
names of the `logged` metrics, and the newest `values` of the metrics to optimise."""


@dataclass(frozen=True)
class Over:
    """How a process ended."""

    last: Mapping[str, Any] | None
    """Its last message; None if it could not send one."""
    code: int | None
    """Its exit code, negative for a signal; None if it was lost with its machine."""

    @property
    def failed(self) -> bool:
        return self.last is None or self.last["status"] == "failed"

    @property
    def of_disk(self) -> bool:
        """Whether it failed because of the disk."""
        return self.last is not None and storage.says_disk_failed(self.last.get("error", ""))


class Rank:
    """A process of a trial, and its messages.

    Args:
        function: what the process executes.
        job: its first trial; None if it waits for one.
        environment: variables set in it in addition to those of this process.
        shares: how many processes share the machine's cores.
        reuse: whether it may train further trials.
        ready: called in it before it waits for its first trial.
    """

    def __init__(
        self,
        function: Function,
        job: TrialJob | None,
        environment: Mapping[str, str],
        shares: int,
        name: str,
        *,
        reuse: bool = False,
        ready: Callable[[], object] = dict,
    ) -> None:
        self._number = -1 if job is None else job.number
        self._last: dict[str, Any] | None = None
        self.connection, theirs = _CONTEXT.Pipe()
        self._link = Link(self.connection)
        self._process = _CONTEXT.Process(
            target=_main, args=(function, job, theirs, environment, shares, reuse, ready), name=name
        )
        with _without_script():
            self._process.start()
        theirs.close()

    @property
    def events(self) -> tuple[Any, int]:
        """For `multiprocessing.connection.wait`: one is ready at a message or the end of the process."""
        return self.connection, self._process.sentinel

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def waits(self) -> bool:
        """Whether its trial has ended and it waits for another."""
        return self._last is not None and self._last["again"] and self.alive

    @property
    def ended(self) -> bool:
        """Whether it has reported the end of its trial."""
        return self._last is not None

    def until_it_waits(self) -> None:
        """Wait until a process without a trial is ready to start one."""
        with contextlib.suppress(EOFError, OSError):  # it has ended, which the caller detects
            self._last = self._link.hear()

    def send(self, job: TrialJob) -> None:
        """Send it another trial, which it trains after its current one."""
        with contextlib.suppress(OSError):  # it has ended, which `events` signals
            self.connection.send(job)

    def turn_to(self, job: TrialJob) -> None:
        """Attribute its messages from now on to this trial, which it was sent before."""
        self._number, self._last = job.number, None

    def heard(self) -> list[Report]:
        """The new reports of its trial."""
        found = []
        try:
            while self._last is None and self.connection.poll():
                said = self._link.hear()
                found += [Report(self._number, **one) for one in said["reports"]]
                if said["kind"] != "reports":
                    self._last = said
        except (EOFError, OSError):
            pass
        return found

    def answer(self, decision: str, *, save: bool) -> None:
        """Answer its report."""
        with contextlib.suppress(OSError):  # it has ended, which `events` signals
            self._link.tell("answer", decision=decision, save=save)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is alive."""
        if self.alive:
            assert self._process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    @property
    def end(self) -> Over:
        """How its trial ended, if it waits for another."""
        return Over(self._last, 0)

    def over(self) -> Over:
        """Wait for its end; returns how it ended."""
        self.heard()  # its last messages
        self._process.join()
        return Over(self._last, self._process.exitcode)

    def close(self) -> None:
        """Close the connection, once the process has ended."""
        self.connection.close()


@dataclass
class _Trial:
    number: int
    ranks: list[Rank]
    gpus: list[str] = field(default_factory=list)
    following: list[TrialJob] = field(default_factory=list)
    """The trials queued behind it in its process."""
    heard: list[Report | Ended | Began] = field(default_factory=list)
    """Messages about those from a process that has ended."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def lasts(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.begun


class Workers:
    """Runs trials in parallel on this machine.

    Args:
        function: what each process executes.
        parallel: the number of trials at a time.
        ranks: the number of processes per trial.
        preload: modules that the forkserver imports in addition to torch.
        gpus: the GPUs to assign, one per rank, in the notation of CUDA_VISIBLE_DEVICES; two ranks share a GPU
            that is listed twice. If empty, trials see the GPUs that this process sees.
        reuse: let a process train one trial after another, if trials have one rank.
        ready: called in a process before it waits for its first trial.
    """

    def __init__(
        self,
        function: Function,
        *,
        parallel: int,
        ranks: int = 1,
        preload: Sequence[str] = (),
        gpus: Sequence[str] = (),
        reuse: bool = False,
        ready: Callable[[], object] = dict,
    ) -> None:
        self._function, self._parallel, self._ranks, self._ready = function, parallel, ranks, ready
        self._reuse = reuse and ranks == 1
        self._idle: list[_Trial] = []
        """Ended trials whose processes wait for another."""
        self._gpus, self._hands_out = list(gpus), bool(gpus)
        self._trials: dict[int, _Trial] = {}
        self._stopping = False
        self._short = False
        """Whether the last trial to end was short."""
        if multiprocessing.current_process().daemon:
            raise BadInput(
                "trials have processes of their own, which a worker of multiprocessing.Pool, or another "
                "daemonic process, cannot start: use concurrent.futures.ProcessPoolExecutor instead"
            )
        warm_up(preload)

    def prepare(self) -> None:
        """Wait until the first trials can start at once, so that imports do not count as their time."""
        if self._reuse:
            waiting = [self._begin(None) for _ in range(self._parallel)]
            for trial in waiting:
                trial.ranks[0].until_it_waits()
                if trial.ranks[0].waits:
                    self._idle.append(trial)
                else:  # it has ended: `start` starts another one
                    self._gpus += trial.gpus
            return
        with _without_script():
            nothing = _CONTEXT.Process(target=_nothing)
            nothing.start()
        nothing.join()

    @property
    def free(self) -> bool:
        """Whether one more trial can be started."""
        gpus = not self._hands_out or bool(self._idle) or len(self._gpus) >= self._ranks
        return len(self._trials) < self._parallel and gpus

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that run."""
        return list(self._trials)

    def start(self, job: TrialJob) -> None:
        """Start a trial."""
        if self._idle:
            over = self._idle.pop()
            over.ranks[0].send(job)
            self._go_on(over, job)
        else:
            self._trials[job.number] = self._begin(job)

    @property
    def takes_ahead(self) -> bool:
        """Whether `ahead` takes one more trial, which it does only if trials are short."""
        return self._has_least_ahead is not None

    def ahead(self, job: TrialJob) -> None:
        """Queue a trial behind the current one of a process; `Began` reports its start.

        If the process ends first, another process trains it.
        """
        trial = self._has_least_ahead
        assert trial is not None
        trial.following.append(job)
        trial.ranks[0].send(job)

    @property
    def _has_least_ahead(self) -> _Trial | None:
        """The trial behind which the next one is queued; None if none is eligible."""
        if not (self._reuse and self._short) or self._stopping:
            return None
        able = [t for t in self._trials.values() if len(t.following) < _AHEAD and t.lasts < _SHORT]
        return min(able, key=lambda trial: len(trial.following), default=None)

    def _go_on(self, over: _Trial, job: TrialJob, following: Sequence[TrialJob] = ()) -> None:
        """Record that the process of an ended trial now trains another."""
        over.ranks[0].turn_to(job)
        self._trials[job.number] = _Trial(job.number, over.ranks, over.gpus, list(following))

    def _begin(self, job: TrialJob | None) -> _Trial:
        """Start the processes of a trial, or without a job a process that waits for one."""
        number = -1 if job is None else job.number
        gpus = [self._gpus.pop(0) for _ in range(self._ranks)] if self._hands_out else []
        common = self._of_a_launch(gpus)
        started = []
        for rank in range(self._ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self._ranks > 1 else {}
            name = f"trial-{number}-rank-{rank}"
            environment, shares = {**common, **place}, self._parallel * self._ranks
            started.append(
                Rank(self._function, job, environment, shares, name, reuse=self._reuse, ready=self._ready)
            )
        return _Trial(number, started, gpus)

    def wait(self, timeout: float | None = None) -> list[Report | Ended | Began]:
        """Wait for events, at most `timeout` seconds; returns those that happened, perhaps none."""
        known = {
            event: (trial, rank)
            for trial in self._trials.values() for rank in trial.ranks for event in rank.events
        }  # fmt: skip
        ready = multiprocessing.connection.wait(list(known), timeout)
        found: list[Report | Ended | Began] = []
        touched: dict[int, _Trial] = {}
        for event in ready:
            trial, rank = known[event]
            touched[trial.number] = trial
            found += rank.heard()
        for trial in touched.values():
            if (ended := self._ended(trial)) is not None:
                found.append(ended)
                found += self._followed(trial)
        return found

    def _followed(self, over: _Trial) -> list[Report | Ended | Began]:
        """Start the trial queued behind an ended one, in the same process if that continues."""
        if not over.following or (self._stopping and over not in self._idle):
            return over.heard
        job, *others = over.following
        if over in self._idle:
            self._idle.remove(over)
            self._go_on(over, job, others)
        else:
            self._trials[job.number] = begun = self._begin(job)
            begun.following = others
            for other in others:
                begun.ranks[0].send(other)
        if self._stopping:  # the signal came during the trial before
            self._trials[job.number].ranks[0].signal(signal.SIGTERM)
        return [*over.heard, Began(job.number)]

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to save a checkpoint."""
        if number in self._trials:  # otherwise it was killed after its report
            self._trials[number].ranks[0].answer(decision, save=save)

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; `wait` returns their ends."""
        self._stopping = True
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all trials."""
        self._send(signal.SIGKILL)

    def close(self) -> None:
        """End the processes that wait for another trial, and wait until their files are on disk."""
        ranks = [rank for trial in self._idle for rank in trial.ranks]
        for rank in ranks:
            rank.close()
        for rank in ranks:
            rank.over()
        self._idle = []

    def _send(self, number: signal.Signals) -> None:
        for trial in self._trials.values():
            for rank in trial.ranks:
                rank.signal(number)

    def _of_a_launch(self, gpus: list[str]) -> dict[str, str]:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        if self._ranks == 1:
            return visible
        here = {"LOCAL_WORLD_SIZE": str(self._ranks)}
        return {**visible, **here, **of_a_launch(self._ranks, "127.0.0.1", machine.free_port())}

    def _ended(self, trial: _Trial) -> Ended | None:
        """How a trial ended, or None while its processes run; if one fails, the others are killed."""
        if trial.ranks[0].waits:
            self._short = trial.lasts < _SHORT
            del self._trials[trial.number]
            self._idle.append(trial)
            return outcome(trial.number, trial.ranks[0].end, [])
        over = [rank for rank in trial.ranks if not rank.alive]
        failed = [end for end in (rank.over() for rank in over) if end.failed]
        if failed and len(over) < len(trial.ranks):
            for rank in trial.ranks:
                if rank not in over:
                    rank.signal(signal.SIGKILL)
        elif len(over) < len(trial.ranks):
            return None
        first = trial.ranks[0].over()
        self._hear_out(trial)
        for rank in trial.ranks:
            rank.over()
            rank.close()
        del self._trials[trial.number]
        self._gpus += trial.gpus
        return outcome(trial.number, first, failed)

    @staticmethod
    def _hear_out(trial: _Trial) -> None:
        """Record queued trials that an ended process had completed, so that none is trained again."""
        rank = trial.ranks[0]
        while trial.following:
            job = trial.following[0]
            rank.turn_to(job)
            reports = rank.heard()
            if not rank.ended:
                return
            end = rank.end
            ended = outcome(job.number, end, [end] if end.failed else [])
            trial.heard += [Began(job.number), *reports, ended]
            del trial.following[0]


def warm_up(preload: Sequence[str] = ()) -> None:
    """Start the forkserver, which imports these modules in addition to torch."""
    forkserver.start(PRELOAD, preload)


def of_a_launch(ranks: int, address: str, port: int) -> dict[str, str]:
    """The variables common to the processes of a trial with several ranks, as torchrun sets them."""
    return {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }  # fmt: skip


def outcome(number: int, first: Over, failed: Sequence[Over]) -> Ended:
    """How a trial ended.

    Args:
        first: how rank 0 ended.
        failed: how the failed ranks ended, except ranks that were killed because another had failed.
    """
    known = first.last or {}
    logged, values = tuple(known.get("logged", ())), known.get("values", {})
    lost = [end for end in failed if end.last is None and (end.code is None or end.code < 0)]
    if lost and lost[0].code is None:
        return Ended(number, "killed", "its machine, or the host process on it, was lost", logged=logged)
    if lost and lost[0].code is not None:
        said = f"its process was killed by {signal.Signals(-lost[0].code).name}"
        return Ended(number, "killed", said, logged=logged)
    for end in sorted(failed, key=lambda end: not end.of_disk):  # the other ranks only lost that one
        if end.last is not None:
            last = end.last
            return Ended(number, "failed", last["error"], last["trace"], logged, refused=last["refused"])
        said = f"its process exited with code {end.code} without a message"
        return Ended(number, "failed", said, logged=logged)
    return Ended(number, known["status"], logged=logged, values=values)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Processes started within this block do not import the script of this process.

    They need nothing from it, and a script that trains on import would start training in each of them.
    """
    with _SCRIPT:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _main(
    function: Function,
    job: TrialJob | None,
    connection: Connection,
    environment: Mapping[str, str],
    shares: int,
    reuse: bool,
    ready: Callable[[], object],
) -> None:
    """The main function of each process of a trial."""
    os.setsid()  # Ctrl-C reaches only the controller, which passes it on once
    signals.hear_once()
    signals.take()
    signals.end_with_parent()
    os.environ.update(environment)
    link = Link(connection)
    machine.share_cores(shares)
    here = psutil.Process()
    most = here.memory_info().rss * _GROWN
    again = True
    try:
        if job is None:
            ready()
            link.tell("waits", again=True)
        while again:
            job = connection.recv() if job is None else job
            end, job = _end_of(function, job, link), None
            again = reuse and end["status"] in _GOES_ON and not _uses_gpu()
            again = again and here.memory_info().rss < most
            link.tell("ended", **end, again=again)
    except EOFError:  # there is no further trial
        pass
    except OSError:  # the controller has ended
        os._exit(1)
    _leave(grouped="RANK" in environment)


def _nothing() -> None:
    """The main function of a process that only has to start."""
    os._exit(0)


def _uses_gpu() -> bool:
    """Whether this process holds GPU memory, which it releases only when it ends."""
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _end_of(function: Function, job: TrialJob, link: Link) -> dict[str, Any]:
    """Train a trial; returns how it ended."""
    try:
        return function(job, link)
    except Stopped as stopped:  # before the run was created
        return {"status": stopped.status}
    except StokerError as error:
        if (cause := error.__cause__) is not None and storage.says_disk_failed(_named(cause)):
            return {"status": "failed", "error": redaction.text(_named(cause)), "trace": "", "refused": False}
        refused = isinstance(error, BadInput)
        return {"status": "failed", "error": redaction.text(str(error)), "trace": "", "refused": refused}
    except BaseException as error:
        return {
            "status": "failed",
            "refused": False,
            "error": redaction.text(_named(error)),
            "trace": redaction.text(trace_of(error)),
        }


def _named(error: BaseException) -> str:
    """An error as a run records it."""
    return f"{type(error).__name__}: {error}"


def _leave(*, grouped: bool) -> None:
    """Exit without Python's cleanup, as nothing in this process is needed any more."""
    with contextlib.suppress(OSError):  # the disk is full or broken, but the trial has already ended
        disk.bring()
    if grouped:
        from stoker import distributed

        distributed.leave()
    # Release what loader workers shared; otherwise the controller warns of leaks.
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
