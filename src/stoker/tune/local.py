"""The processes of trials on this machine, from a forkserver that has imported what they need.

Each trial has processes of its own, one a rank, so that its memory is given back, and what it breaks is its
own; where it is asked for, a process trains one trial after another as long as its memory does not grow. If
the controller dies, so do they.
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
from stoker import disk, machine, redaction, signals
from stoker.errors import BadInput, StokerError, Stopped, trace_of
from stoker.run import view
from stoker.tune.trial import Began, Ended, Job, Link, Report

PRELOAD = ("stoker.cli.trial", "stoker.preloaded")
_GROWN = 1.25
"""How much of the memory at its start a process may hold and still train another trial."""
_AHEAD = 2
"""Trials that a process has in its hands besides its own, so that it never waits for the controller."""
_SHORT = 1.0
"""Seconds that a trial takes at most behind which another one is put: it is not begun anywhere else."""
_GOES_ON = (view.FINISHED, view.STOPPED, view.PAUSED)
"""How a trial ends whose process may train another: any other way it failed, or was told to end."""
_CONTEXT = multiprocessing.get_context("forkserver")
_SCRIPT = threading.Lock()

Function = Callable[[Job, Link], dict[str, Any]]
"""What each process of a trial does, found by its name: trains, and returns the `status` of the run, the
names of the metrics that it has `logged`, and the newest `values` of those that are searched for."""


@dataclass(frozen=True)
class Over:
    """How a process ended."""

    last: Mapping[str, Any] | None
    """What it said itself; None where it could not any more."""
    code: int | None
    """Its exit code, negative for a signal; None where its machine was lost with it."""

    @property
    def failed(self) -> bool:
        return self.last is None or self.last["status"] == "failed"


class Rank:
    """A process of a trial, and what it says.

    Args:
        function: what it does.
        job: its first trial; None where it waits for one.
        environment: variables that are set in it beside those of this process.
        shares: how many processes share the cores of the machine.
        reuse: whether it may train further trials.
        ready: what it does before it waits for one.
    """

    def __init__(
        self,
        function: Function,
        job: Job | None,
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
        """What `multiprocessing.connection.wait` takes: one is ready once there is something to be heard."""
        return self.connection, self._process.sentinel

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def waits(self) -> bool:
        """Whether it has ended its trial and waits for another."""
        return self._last is not None and self._last["again"] and self.alive

    @property
    def ended(self) -> bool:
        """Whether it has said how its trial ended."""
        return self._last is not None

    def until_it_waits(self) -> None:
        """Wait until it can begin a trial at once, if it has none yet."""
        with contextlib.suppress(EOFError, OSError):  # it is gone; that is seen by itself
            self._last = self._link.hear()

    def send(self, job: Job) -> None:
        """Let it have another trial, which it trains once it is done with its own."""
        with contextlib.suppress(OSError):  # it is gone; that is seen by itself
            self.connection.send(job)

    def turn_to(self, job: Job) -> None:
        """From now on what it says is of the trial that it was sent."""
        self._number, self._last = job.number, None

    def heard(self) -> list[Report]:
        """What it has reported of its trial since it was asked last."""
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
        with contextlib.suppress(OSError):  # it is gone; that is seen by itself
            self._link.tell("answer", decision=decision, save=save)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if self.alive:
            assert self._process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    @property
    def end(self) -> Over:
        """How its trial ended, where it waits for another."""
        return Over(self._last, 0)

    def over(self) -> Over:
        """How it ended; waits for the end."""
        self.heard()  # its last words
        self._process.join()
        return Over(self._last, self._process.exitcode)

    def close(self) -> None:
        """Let go of it, once it is over."""
        self.connection.close()


@dataclass
class _Trial:
    number: int
    ranks: list[Rank]
    gpus: list[str] = field(default_factory=list)
    following: list[Job] = field(default_factory=list)
    """What its process trains right after it."""
    heard: list[Report | Ended | Began] = field(default_factory=list)
    """What a process that is gone had said of those."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def lasts(self) -> float:
        """For how many seconds it has run."""
        return time.monotonic() - self.begun


class Workers:
    """Runs trials, so many at a time.

    Args:
        function: what each process does.
        parallel: trials at a time.
        ranks: processes of a trial.
        preload: modules that the forkserver imports besides torch.
        gpus: those that are handed out, one a rank, as CUDA_VISIBLE_DEVICES names them; one that comes
            twice is shared by two. Without any, trials see the GPUs that this process sees.
        reuse: a process trains further trials, if they are of one rank.
        ready: what a process does that waits for its first trial.
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
        """Trials that are over, of processes that wait for another."""
        self._gpus, self._hands_out = list(gpus), bool(gpus)
        self._trials: dict[int, _Trial] = {}
        self._stopping = False
        self._short = False
        """Whether the trial that ended last was."""
        warm_up(preload)

    def prepare(self) -> None:
        """Wait until the first trials can be started at once: their time is not to be that of imports."""
        if self._reuse:
            waiting = [self._begin(None) for _ in range(self._parallel)]
            for trial in waiting:
                trial.ranks[0].until_it_waits()
                if trial.ranks[0].waits:
                    self._idle.append(trial)
                else:  # it is gone: another one is started for a trial
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

    def start(self, job: Job) -> None:
        """Start a trial."""
        if self._idle:
            over = self._idle.pop()
            over.ranks[0].send(job)
            self._go_on(over, job)
        else:
            self._trials[job.number] = self._begin(job)

    @property
    def takes_ahead(self) -> bool:
        """Whether `ahead` takes one more trial: where trials are short."""
        return self._has_least_ahead is not None

    def ahead(self, job: Job) -> None:
        """Have a trial trained by a process that still trains another, right after that; `Began` tells of it.

        Where the process ends, another one trains it.
        """
        trial = self._has_least_ahead
        assert trial is not None
        trial.following.append(job)
        trial.ranks[0].send(job)

    @property
    def _has_least_ahead(self) -> _Trial | None:
        """The trial behind which the next one comes, where one may."""
        if not (self._reuse and self._short) or self._stopping:
            return None
        able = [t for t in self._trials.values() if len(t.following) < _AHEAD and t.lasts < _SHORT]
        return min(able, key=lambda trial: len(trial.following), default=None)

    def _go_on(self, over: _Trial, job: Job, following: Sequence[Job] = ()) -> None:
        """Take down that the process of a trial that is over trains another one."""
        over.ranks[0].turn_to(job)
        self._trials[job.number] = _Trial(job.number, over.ranks, over.gpus, list(following))

    def _begin(self, job: Job | None) -> _Trial:
        """Start the processes of a trial, or one that waits for any."""
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
        """What happened, once something has, or after so many seconds."""
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
        """Have the trial that is to follow one be trained, by the same process where that goes on."""
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
        if self._stopping:  # it was told so when it trained the one before
            self._trials[job.number].ranks[0].signal(signal.SIGTERM)
        return [*over.heard, Began(job.number)]

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to take a checkpoint."""
        if number in self._trials:  # else it was killed right after
            self._trials[number].ranks[0].answer(decision, save=save)

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; they are waited for by `wait`."""
        self._stopping = True
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End all trials at once."""
        self._send(signal.SIGKILL)

    def close(self) -> None:
        """End the processes that wait for another trial, once what they wrote is on the disk."""
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
        """How a trial ended, once none of its processes is left; one that fails takes the others with it."""
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
        """Take down what a process that is gone has trained to its end besides: nobody is to do it again."""
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
    """Start the server of processes, which imports these modules besides torch."""
    _CONTEXT.set_forkserver_preload([*preload, *PRELOAD])
    signals.start_forkserver()


def of_a_launch(ranks: int, address: str, port: int) -> dict[str, str]:
    """What the processes of a trial with several ranks have in common, as torchrun sets it."""
    return {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }  # fmt: skip


def outcome(number: int, first: Over, failed: Sequence[Over]) -> Ended:
    """How a trial ended.

    Args:
        first: how rank 0 did.
        failed: the ranks that failed, but for those that were ended because of these.
    """
    known = first.last or {}
    logged, values = tuple(known.get("logged", ())), known.get("values", {})
    lost = [end for end in failed if end.last is None and (end.code is None or end.code < 0)]
    if lost and lost[0].code is None:
        return Ended(number, "killed", "its machine or its supervisor there was lost", logged=logged)
    if lost and lost[0].code is not None:
        said = f"its process was killed by {signal.Signals(-lost[0].code).name}"
        return Ended(number, "killed", said, logged=logged)
    for end in failed:
        if end.last is not None:
            last = end.last
            return Ended(number, "failed", last["error"], last["trace"], logged, refused=last["refused"])
        said = f"its process exited with code {end.code} without a message"
        return Ended(number, "failed", said, logged=logged)
    return Ended(number, known["status"], logged=logged, values=values)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Processes that are started within this block do not import the script that this one runs.

    None of what they do is in it; and one that trains when it is imported would begin to do so in each.
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
    job: Job | None,
    connection: Connection,
    environment: Mapping[str, str],
    shares: int,
    reuse: bool,
    ready: Callable[[], object],
) -> None:
    """What each process of a trial does."""
    os.setsid()  # Ctrl-C reaches the controller alone, which passes it on once
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
    except EOFError:  # there is no other
        pass
    except OSError:  # the controller is gone
        os._exit(1)
    _leave(grouped="RANK" in environment)


def _nothing() -> None:
    """Of a process that is only to be there."""
    os._exit(0)


def _uses_gpu() -> bool:
    """Whether this process holds memory of a GPU, which it gives back only at its end."""
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _end_of(function: Function, job: Job, link: Link) -> dict[str, Any]:
    """Do it, and say how it ended."""
    try:
        return function(job, link)
    except Stopped as stopped:  # before there was a run
        return {"status": stopped.status}
    except StokerError as error:
        refused = isinstance(error, BadInput)
        return {"status": "failed", "error": redaction.text(str(error)), "trace": "", "refused": refused}
    except BaseException as error:
        return {
            "status": "failed",
            "refused": False,
            "error": redaction.text(f"{type(error).__name__}: {error}"),
            "trace": redaction.text(trace_of(error)),
        }


def _leave(*, grouped: bool) -> None:
    """End without what Python does at its end: nothing of this process is needed any more."""
    with contextlib.suppress(OSError):  # the disk is full, or broken: the trial is over as it is
        disk.bring()
    if grouped:
        from stoker import distributed

        distributed.leave()
    # What loader workers shared: else the controller tells of leaks.
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
