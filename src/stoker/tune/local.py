"""The processes of trials on this machine, from a forkserver that has imported what they need.

Each trial has processes of its own, one a rank, so that its memory is given back, and what it breaks is its
own; where it is asked for, a process trains one trial after another as long as its memory does not grow. If
the controller dies, so do they.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil
from stoker import machine, signals
from stoker.errors import StokerError, Stopped
from stoker.tune.trial import Ended, Job, Link, Report

PRELOAD = ("torch", "torch._dynamo", "stoker.loop", "stoker.cli.sweep")
_GROWN = 1.25
"""How much of the memory at its start a process may hold and still train another trial."""
_KILLED = 5.0  # seconds that ranks have to end after one of them has failed

Function = Callable[[Job, Link], dict[str, Any]]
"""What each process of a trial does, found by its name: trains, and returns the `status` of the run, the
names of the metrics that it has `logged`, and the newest `values` of those that are searched for."""


@dataclass
class _Rank:
    process: Any
    connection: Connection
    last: dict[str, Any] | None = None
    """What it said at the end of its trial."""

    @property
    def waits(self) -> bool:
        """Whether it has ended its trial and waits for another."""
        return self.last is not None and self.last["again"] and self.process.is_alive()


@dataclass
class _Trial:
    number: int
    ranks: list[_Rank]
    gpus: list[int] = field(default_factory=list)


class Workers:
    """Runs trials, so many at a time.

    Args:
        function: what each process does.
        parallel: trials at a time.
        ranks: processes of a trial.
        preload: modules that the forkserver imports besides torch.
        gpus: the numbers of the GPUs that are handed out, one a rank; a number that comes twice is one that
            two ranks share. Without any, trials see the GPUs that this process sees.
        reuse: a process trains further trials, if they are of one rank.
    """

    def __init__(
        self,
        function: Function,
        *,
        parallel: int,
        ranks: int = 1,
        preload: Sequence[str] = (),
        gpus: Sequence[int] = (),
        reuse: bool = False,
    ) -> None:
        self._function, self._parallel, self._ranks = function, parallel, ranks
        self._reuse = reuse and ranks == 1
        self._idle: list[_Trial] = []
        """Trials that are over, of processes that wait for another."""
        self._gpus, self._hands_out = list(gpus), bool(gpus)
        self._trials: dict[int, _Trial] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        signals.start_forkserver()

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
            self._start_again(self._idle.pop(), job)
            return
        gpus = [self._gpus.pop(0) for _ in range(self._ranks)] if self._hands_out else []
        common, shares = self._of_a_launch(gpus), self._parallel * self._ranks
        started = []
        for rank in range(self._ranks):
            ours, theirs = self._context.Pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self._ranks > 1 else {}
            process = self._context.Process(
                target=_main,
                args=(self._function, job, theirs, {**common, **place}, shares, self._reuse),
                name=f"trial-{job.number}-rank-{rank}",
            )  # fmt: skip
            process.start()
            theirs.close()
            started.append(_Rank(process, ours))
        self._trials[job.number] = _Trial(job.number, started, gpus)

    def _start_again(self, over: _Trial, job: Job) -> None:
        """Let the process of a trial that is over train another."""
        rank = over.ranks[0]
        rank.last = None
        with contextlib.suppress(OSError):  # it is gone; that is seen by itself
            rank.connection.send(job)
        self._trials[job.number] = _Trial(job.number, over.ranks, over.gpus)

    def wait(self, timeout: float | None = None) -> list[Report | Ended]:
        """What happened, once something has, or after so many seconds."""
        known: dict[Any, tuple[_Trial, _Rank]] = {}
        for trial in self._trials.values():
            for rank in trial.ranks:
                known[rank.connection] = known[rank.process.sentinel] = (trial, rank)
        ready = multiprocessing.connection.wait(list(known), timeout)
        found: list[Report | Ended] = []
        touched: dict[int, _Trial] = {}
        for thing in ready:
            trial, rank = known[thing]
            touched[trial.number] = trial
            found += self._heard(trial, rank)
        for trial in touched.values():
            if (ended := self._ended(trial)) is not None:
                found.append(ended)
        return found

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to take a checkpoint."""
        with contextlib.suppress(OSError):  # it is gone; that is seen by itself
            Link(self._trials[number].ranks[0].connection).tell("answer", decision=decision, save=save)

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; they are waited for by `wait`."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End all trials at once."""
        self._send(signal.SIGKILL)

    def close(self) -> None:
        """End the processes that wait for another trial."""
        for trial in self._idle:
            for rank in trial.ranks:
                rank.connection.close()
        self._idle = []

    def _send(self, number: signal.Signals) -> None:
        for trial in self._trials.values():
            for rank in trial.ranks:
                _signal(rank.process, number)

    def _of_a_launch(self, gpus: list[int]) -> dict[str, str]:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        if self._ranks == 1:
            return visible
        return {
            **visible, "WORLD_SIZE": str(self._ranks), "LOCAL_WORLD_SIZE": str(self._ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(machine.free_port()),
            "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        }  # fmt: skip

    def _heard(self, trial: _Trial, rank: _Rank) -> list[Report | Ended]:
        found: list[Report | Ended] = []
        try:
            while rank.connection.poll():
                said = Link(rank.connection).hear()
                if said["kind"] == "report":
                    found.append(Report(trial.number, said["step"], said["value"], said["per_step"]))
                else:
                    rank.last = said
        except (EOFError, OSError):
            pass
        return found

    def _ended(self, trial: _Trial) -> Ended | None:
        """How a trial ended, once none of its processes is left; one that fails takes the others with it."""
        if trial.ranks[0].waits:
            del self._trials[trial.number]
            self._idle.append(trial)
            return _outcome(trial, [])
        over = [rank for rank in trial.ranks if not rank.process.is_alive()]
        for rank in over:
            self._heard(trial, rank)  # its last words
        failed = [rank for rank in over if rank.last is None or rank.last["status"] == "failed"]
        if failed and len(over) < len(trial.ranks):
            for rank in trial.ranks:
                if rank not in over:
                    _signal(rank.process, signal.SIGKILL)
                    rank.process.join(_KILLED)
        elif len(over) < len(trial.ranks):
            return None
        for rank in trial.ranks:
            self._heard(trial, rank)
            rank.process.join()
            rank.connection.close()
        del self._trials[trial.number]
        self._gpus += trial.gpus
        return _outcome(trial, failed)


def _outcome(trial: _Trial, failed: list[_Rank]) -> Ended:
    number, last = trial.number, trial.ranks[0].last or {}
    logged, values = tuple(last.get("logged", ())), last.get("values", {})
    said = [rank.last for rank in failed if rank.last is not None]
    if said:
        return Ended(number, "failed", said[0]["error"], said[0]["trace"], logged)
    if failed:
        code = failed[0].process.exitcode
        if code < 0:
            said_of = f"its process was killed by {signal.Signals(-code).name}"
            return Ended(number, "killed", said_of, logged=logged)
        return Ended(number, "failed", f"its process ended with {code} and said nothing", logged=logged)
    return Ended(number, last["status"], logged=logged, values=values)


def _main(
    function: Function,
    job: Job,
    connection: Connection,
    environment: Mapping[str, str],
    shares: int,
    reuse: bool,
) -> None:
    """What each process of a trial does."""
    os.setsid()  # Ctrl-C reaches the controller alone, which passes it on once
    signals.take()
    signals.end_with_parent()
    os.environ.update(environment)
    link = Link(connection)
    machine.share_cores(shares)
    most = _memory() * _GROWN
    again = True
    while again:
        try:
            end = _end_of(function, job, link)
            again = reuse and end["status"] != "failed" and _memory() < most and not _uses_gpu()
            link.tell("ended", **end, again=again)
            if again:
                job = connection.recv()
        except EOFError:  # there is none
            break
        except OSError:  # the controller is gone
            os._exit(1)
    _leave(grouped="RANK" in environment)


def _memory() -> int:
    """Bytes that this process holds."""
    return int(psutil.Process().memory_info().rss)


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
        return {"status": "failed", "error": str(error), "trace": ""}
    except BaseException as error:
        return {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "trace": traceback.format_exc(),
        }


def _leave(*, grouped: bool) -> None:
    """End without what Python does at its end: nothing of this process is needed any more."""
    if grouped:
        from stoker import distributed

        distributed.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _signal(process: Any, number: signal.Signals) -> None:
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
