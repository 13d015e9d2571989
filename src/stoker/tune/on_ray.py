"""Runs the processes of trials on the machines of a Ray cluster.

A trial is a placement group with one actor per rank, its host (see `ray_host`).

Each trial has a thread in the controller that follows it from start to end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import ray_cluster
from stoker.errors import BadInput, StokerError
from stoker.status import PREEMPTED
from stoker.tune import local
from stoker.tune.local import Function, Over
from stoker.tune.ray_host import Host, HostPlace
from stoker.tune.trial import Began, Ended, Report, TrialJob
from stoker.words import first_line

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("stoker")

_LOOK = 0.2  # seconds between checks for signals to a trial, while nothing happens
_GROWN = 10.0  # seconds between checks of the cluster's size
_SETTLED = 30.0  # seconds for a host to report the end of its process, after another rank failed
_UNHEARD = Over(None, None)
_PASSED_ON = ("STOKER_", "HF_", "TORCH_", "NCCL_", "GLOO_", "OMP_")
"""Prefixes of the environment variables that are passed on to all machines."""


@contextlib.contextmanager
def started(
    function: Function,
    *,
    address: str | None = None,
    ranks: int = 1,
    parallel: int | None = None,
    preload: Sequence[str] = (),
) -> Iterator[Workers]:
    """Connect to a cluster for the duration of the block, and yield workers on it.

    If this process is connected to a cluster already, that connection is used, and stays.

    Args:
        function: what each process of a trial executes.
        address: the cluster's address, `HOST:PORT` or `auto`; by default that of the connection, or else
            RAY_ADDRESS, and if that is not set, Ray is started on this machine only.
        ranks: the number of processes per trial.
        parallel: the number of trials at a time; by default as many as there is room for.
        preload: modules imported before the first trial, in addition to torch.

    Raises:
        BadInput: Ray is not installed, no cluster can be reached, this process is connected to another one,
            or the cluster has no room for a single trial.
    """
    with ray_cluster.connected(address):
        workers = Workers(function, ranks=ranks, parallel=parallel, preload=preload)
        try:
            yield workers
        finally:
            workers.close()


@dataclass(frozen=True)
class _Slot:
    """Resources reserved for a trial on the cluster, with its hosts in rank order."""

    group: PlacementGroup
    hosts: Sequence[Any]


def _environments(places: Sequence[HostPlace]) -> list[dict[str, str]]:
    """The variables for each rank of a trial, as torchrun sets them."""
    if len(places) == 1:
        return [{}]
    launch = local.of_a_launch(len(places), places[0].address, places[0].port)
    found = []
    for rank, place in enumerate(places):
        here = [other for other, known in enumerate(places) if known.node == place.node]
        gpus = [gpu for other in here for gpu in places[other].gpus]
        found.append({
            **launch, "RANK": str(rank), "LOCAL_RANK": str(here.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(here)),
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        })  # fmt: skip
    return found


@dataclass
class _Trial:
    job: TrialJob
    slot: _Slot | None = None
    thread: threading.Thread | None = None
    signals: list[signal.Signals] = field(default_factory=list)
    """Signals that are still to be sent."""


class Workers:
    """Runs trials on the connected cluster, as `local.Workers` does on one machine.

    Args:
        function: what each process executes.
        ranks: the number of processes per trial; each gets a GPU if the cluster has any, otherwise a CPU.
        parallel: the number of trials at a time; by default as many as there is room for.
        preload: modules imported before the first trial, in addition to torch.

    Raises:
        BadInput: the cluster has no room for a single trial.
    """

    def __init__(
        self,
        function: Function,
        *,
        ranks: int = 1,
        parallel: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self._function, self._ranks, self._preload = function, ranks, tuple(preload)
        self._parallel = parallel or math.inf
        self._needs = {"GPU": 1.0, "CPU": 1.0} if _has_gpus() else {"CPU": 1.0}
        self._events: queue.Queue[Report | Ended] = queue.Queue()
        self._trials: dict[int, _Trial] = {}
        self._idle: list[_Slot] = []
        self._unfit: set[str] = set()
        """The nodes that cannot have a host."""
        self._room, self._looked = self._count(), time.monotonic()
        if self._room == 0:
            raise BadInput(self._lacking())

    def prepare(self) -> None:
        """Does nothing: each host imports what its trials need."""

    @property
    def free(self) -> bool:
        """Whether one more trial can be started."""
        if time.monotonic() - self._looked > _GROWN:
            self._room, self._looked = self._count(), time.monotonic()
        return len(self._trials) < min(self._parallel, self._room)

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that run."""
        return list(self._trials)

    def start(self, job: TrialJob) -> None:
        """Start a trial as soon as there is room for it on the cluster."""
        self._trials[job.number] = trial = _Trial(job)
        if self._idle:
            trial.slot = self._idle.pop()
        name = f"trial-{job.number}"
        trial.thread = threading.Thread(target=self._train, args=(trial,), name=name, daemon=True)
        trial.thread.start()

    def wait(self, timeout: float | None = None) -> list[Report | Ended | Began]:
        """Wait for events, at most 10 or `timeout` seconds; returns those that happened, perhaps none.

        First returns to the cluster the resources that no trial has used since the last call.
        """
        while self._idle:
            _give_back(self._idle.pop())
        found: list[Report | Ended | Began] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=_GROWN if timeout is None else min(timeout, _GROWN)))
            while True:
                found.append(self._events.get_nowait())
        for happened in found:
            if isinstance(happened, Ended):
                slot = self._trials.pop(happened.number).slot
                if slot is not None:
                    self._idle.append(slot)
        return found

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        """Tell a trial that has reported what to do, and whether to save a checkpoint."""
        slot = self._trials[number].slot if number in self._trials else None  # it may have been killed
        if slot is not None:
            slot.hosts[0].answer.remote(decision, save)

    def stop(self) -> None:
        """Tell all trials to stop with a checkpoint; `wait` returns their ends."""
        for trial in self._trials.values():
            trial.signals.append(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all trials."""
        for trial in self._trials.values():
            trial.signals.append(signal.SIGKILL)

    def close(self) -> None:
        """Kill the running trials and return all resources to the cluster."""
        self.kill()
        for trial in self._trials.values():
            if trial.thread is not None:
                trial.thread.join(_SETTLED)
            if trial.slot is not None:
                self._idle.append(trial.slot)
        while self._idle:
            _give_back(self._idle.pop())

    # -- one trial, in a thread of its own -----------------------------------------------------------

    def _train(self, trial: _Trial) -> None:
        """Run a trial from start to end; its slot is released if a host is lost."""
        from ray.exceptions import RayError

        number = trial.job.number
        try:
            if trial.slot is None:
                trial.slot = self._place(trial)
            ended = self._follow(trial, trial.slot) if trial.slot else Ended(number, PREEMPTED)
        except RayError as error:
            said = first_line(error)
            ended = Ended(number, "killed", f"its host on the cluster was lost: {said}")
            self._drop(trial)
        except StokerError as error:  # it is tried again, elsewhere if possible
            ended = Ended(number, "killed", str(error))
        except Exception as error:  # a bug: reported, as the controller would wait forever otherwise
            log.exception("trial %d", number)
            ended = Ended(number, "failed", f"{type(error).__name__}: {error}")
            self._drop(trial)
        self._events.put(ended)

    def _place(self, trial: _Trial) -> _Slot | None:
        """Wait for room on the cluster and reserve it; None if the trial is told to end before that.

        Raises StokerError if a node cannot have a host.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        usable = {node["NodeID"] for node in self._usable()}
        avoided = sorted(self._unfit - usable)
        others = {"ray.io/node-id": f"!in({','.join(avoided)})"} if avoided else {}
        group = placement_group(
            [self._needs] * self._ranks, strategy="PACK", bundle_label_selector=[others] * self._ranks
        )
        waits = f"trial {trial.job.number} is waiting for room on the cluster"
        if not ray_cluster.wait_for_room(group, trial.signals, lambda: log.info("%s", waits)):
            remove_placement_group(group)
            return None
        passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        made = ray.remote(num_cpus=1, num_gpus=self._needs.get("GPU", 0), max_concurrency=4)(Host)
        hosts = [
            made.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote(
                self._preload, Path.cwd(), passed
            )
            for rank in range(self._ranks)
        ]
        try:
            asked = [host.place.remote() for host in hosts]
            nodes = [self._node_of(group, bundle, answer) for bundle, answer in enumerate(asked)]
        except BaseException:
            _give_back(_Slot(group, hosts))
            raise
        # Grouped by machine.
        order = sorted(range(self._ranks), key=lambda bundle: nodes.index(nodes[bundle]))
        return _Slot(group, [hosts[bundle] for bundle in order])

    def _node_of(self, group: PlacementGroup, bundle: int, answer: Any) -> str:
        """The node of a host, by its answer. Raises StokerError if none could begin there."""
        import ray
        from ray.exceptions import RayActorError

        try:
            return str(ray.get(answer).node)
        except RayActorError as error:
            if not error.actor_init_failed:
                raise
            node = ray_cluster.node_of(group, bundle)
            said = f"{ray_cluster.shown(node)} cannot run trials: {ray_cluster.cause(error)}"
            if node not in self._unfit:
                log.warning("%s", said)
            self._unfit.add(node)
            self._looked = -math.inf  # there is less room now
            raise StokerError(said) from error

    def _follow(self, trial: _Trial, slot: _Slot) -> Ended:
        """Start the processes of a trial, forward their reports and wait for their end."""
        import ray

        places: list[HostPlace] = ray.get([host.place.remote() for host in slot.hosts])
        shares = self._per_node()
        ray.get([
            host.start.remote(self._function, trial.job, environment, shares)
            for host, environment in zip(slot.hosts, _environments(places), strict=True)
        ])  # fmt: skip
        hearing = {host.hear.remote(): rank for rank, host in enumerate(slot.hosts)}
        over: dict[int, Over] = {}
        failed: list[Over] = []
        while hearing and not failed:
            ready, _ = ray.wait(list(hearing), timeout=_LOOK)
            self._pass_on(trial, slot)
            for answer in ready:
                rank = hearing.pop(answer)
                reports, end = _heard(answer)
                for report in reports:
                    self._events.put(report)
                if end is None:
                    hearing[slot.hosts[rank].hear.remote()] = rank
                else:
                    over[rank] = end
            failed = [end for end in over.values() if end.failed]
        if failed:
            failed += [
                end for end in _end_others([slot.hosts[rank] for rank in hearing.values()]) if end.failed
            ]
        if any(end.code is None for end in failed):
            log.warning("trial %d: a machine, or the host process on it, was lost", trial.job.number)
            self._drop(trial)
        ended = local.outcome(trial.job.number, over.get(0, _UNHEARD), failed)
        if ended.refused and len(self._usable()) > 1:  # what is missing may be there on the others
            rank = min(rank for rank, end in over.items() if end.failed)
            return replace(ended, where=ray_cluster.shown(places[rank].node))
        return ended

    def _pass_on(self, trial: _Trial, slot: _Slot) -> None:
        while trial.signals:
            number = trial.signals.pop(0)
            for host in slot.hosts:
                host.send.remote(int(number))

    def _drop(self, trial: _Trial) -> None:
        slot, trial.slot = trial.slot, None
        if slot is not None:
            _give_back(slot)

    # -- the size of the cluster --------------------------------------------------------------------

    def _count(self) -> int:
        """How many trials the cluster has room for, if nobody else uses it."""
        return self._fitting(self._usable())

    def _fitting(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        return sum(_bundles(node["Resources"], self._needs) for node in nodes) // self._ranks

    def _usable(self) -> list[dict[str, Any]]:
        """The nodes for trials: those where hosts could begin, or all if those have no room for a trial."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        fit = [node for node in alive if node["NodeID"] not in self._unfit]
        return fit if self._fitting(fit) else alive

    def _per_node(self) -> int:
        """The largest number of ranks that fit on one machine."""
        import ray

        return max(_bundles(node["Resources"], self._needs) for node in ray.nodes()) or 1

    def _lacking(self) -> str:
        import ray

        there = ray.cluster_resources()
        said = ", ".join(f"{there.get(kind, 0):g} {kind}s" for kind in self._needs)
        alive = sum(node["Alive"] for node in ray.nodes())
        kind = next(iter(self._needs))
        return (
            f"--nproc {self._ranks}: a trial needs {self._ranks} {kind}{'s' if self._ranks > 1 else ''}, and "
            f"the cluster has {said} on {alive} machine{'s' if alive > 1 else ''}: give a smaller "
            "--nproc, or add machines to the cluster"
        )


def _has_gpus() -> bool:
    import ray

    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _bundles(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many ranks fit into these resources."""
    return int(min(resources.get(kind, 0) // count for kind, count in needs.items()))


def _heard(answer: Any) -> tuple[list[Report], Over | None]:
    """The result of a host's `hear`; if the host is lost, its process counts as ended."""
    import ray
    from ray.exceptions import RayError

    try:
        found: tuple[list[Report], Over | None] = ray.get(answer)
    except RayError as error:
        log.debug("%s", error)
        return [], _UNHEARD
    return found


def _end_others(hosts: Sequence[Any]) -> list[Over]:
    """Kill the remaining ranks of a trial after one failed; returns how those ended that had already.

    If a machine is lost, the other ranks fail too, and their failures may be reported before the loss is
    known.
    """
    import ray
    from ray.exceptions import RayError

    found: list[Over] = []
    for answer in [host.end.remote() for host in hosts]:
        try:
            if (end := ray.get(answer, timeout=_SETTLED)) is not None:
                found.append(end)
        except RayError as error:
            log.debug("%s", error)
            found.append(_UNHEARD)
    return found


def _give_back(slot: _Slot) -> None:
    """Kill the hosts of a slot with their processes, and release its resources."""
    import ray
    from ray.util.placement_group import remove_placement_group

    for host in slot.hosts:
        ray.kill(host)
    remove_placement_group(slot.group)
