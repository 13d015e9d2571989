"""The driver of a job on a Ray cluster: a launcher on each of its nodes, placed by Ray.

    python -m stoker.launch.ray_nodes --name NAME --nodes 2 --cpus 8 --gpus 8 -- python -m stoker train ...

A launcher is what `stoker train` is on any machine: it starts the ranks of its node, and meets the others.
An actor next to it starts it, and is what Ray supervises. If a node is lost, the launchers on all nodes are
ended; they are started again as soon as Ray has room, and resume from the newest checkpoint. A node that
lacks what a launcher needs gets no better by that: it ends the job, as bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from stoker import machine, ray_cluster
from stoker.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, BadInput, StokerError
from stoker.launch import job_uploader, jobs
from stoker.reproduce import shipped
from stoker.run import finding
from stoker.words import counted, first_line

MEETING = "{rendezvous}"
"""As a separate word of a command: the HOST:PORT where the launchers meet."""

_LOOK = 0.2  # seconds between two looks at the launchers
_PARTING = 5.0  # seconds for the other launchers to end by themselves after one has refused its input
_ENDING = 30.0  # seconds for the remaining launchers to end
_QUIET = 1.0  # seconds without a line of theirs, after which there are no more
_LAST_LINES = 10.0  # seconds after which there are none in any case
_LOST = -1


@dataclass(frozen=True)
class Needs:
    """The resources of each node."""

    nodes: int
    cpus: int
    gpus: int
    memory: int
    """Bytes; 0 for no specific amount."""
    retries: int
    """How often it may fail and be started again; a lost node is not a failure."""

    @property
    def bundle(self) -> dict[str, float]:
        """A node's resources in Ray's terms."""
        found = {"CPU": float(self.cpus), "GPU": float(self.gpus), "memory": float(self.memory)}
        return {name: amount for name, amount in found.items() if amount}


class Node:
    """A launcher of a node. Its methods return immediately, in the one thread that started it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        """What Ray prefixes each of its output lines with."""
        return f"node {self._number}"

    def place(self) -> str:
        """The HOST:PORT where the others can reach it."""
        import ray

        return f"{ray.util.get_node_ip_address()}:{machine.free_port()}"

    def start(self, command: Sequence[str], folder: str) -> None:
        """Start it in a folder, or in the one that was sent here."""
        environment = os.environ if folder else {**os.environ, shipped.FOLDER: str(Path.cwd())}
        beside = [sys.executable, "-m", "stoker.launch.beside", str(os.getpid())]
        self._process = subprocess.Popen([*beside, *command], cwd=folder or None, env=environment)

    def ended(self) -> int | None:
        """Its exit code, as in a shell, once it has ended."""
        assert self._process is not None
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def tell(self) -> None:
        """Tell it to stop after a checkpoint."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End it immediately; its ranks are gone when this returns."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            known = [
                psutil.Process(self._process.pid),
                *psutil.Process(self._process.pid).children(recursive=True),
            ]
            self._process.kill()
            psutil.wait_procs(known, timeout=_ENDING)


def run(name: str, needs: Needs, command: Sequence[str], folder: str) -> int:
    """Run a command on the nodes of a job until it is done; returns its exit code.

    Args:
        name: the job's name, by which its actors are found, see `ray_end`.
        command: each launcher's command; can contain `MEETING`.
        folder: its working directory; empty for Ray's.
    """
    import ray

    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)

    ray.init("auto", namespace=name, log_to_driver=True)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    failures = 0
    try:
        while True:
            code = _attempt(needs, command, folder, told)
            if code in (0, EXIT_BAD_INPUT) or told:
                return code if code != _LOST else EXIT_PREEMPTED
            failures += code not in (_LOST, EXIT_PREEMPTED)
            if failures > needs.retries:
                return code
            known = {_LOST: "a node was lost", EXIT_PREEMPTED: "it was told to stop"}
            why = known.get(code, f"exit code {code}")
            _say(f"{why}; starting again, retries left: {needs.retries - failures}")
    finally:
        _wait_for_last_lines()
        ray.shutdown()  # when this returns, whatever delivers more of them has ended


def _attempt(needs: Needs, command: Sequence[str], folder: str, told: Sequence[int]) -> int:
    """One launch on all nodes; returns their exit code, or `_LOST`."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(
        [needs.bundle] * needs.nodes, strategy="STRICT_SPREAD" if needs.nodes > 1 else "PACK"
    )
    try:
        room = f"{counted(needs.nodes, 'node')} with {needs.bundle} each"
        waits = f"waiting for the cluster to have room for {room}"
        if not ray_cluster.wait_for_room(group, told, lambda: _say(waits)):
            return EXIT_PREEMPTED
        _check(group, needs, command[0], folder)
        actor = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus)(Node)
        nodes = [
            actor.options(
                name=uuid.uuid4().hex,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=number
                ),
            ).remote(number)
            for number in range(needs.nodes)
        ]
        try:
            meeting = ray.get(nodes[0].place.remote())
            words = [meeting if word == MEETING else word for word in command]
            ray.get([node.start.remote(words, folder) for node in nodes])
            return _wait(nodes, told)
        except ray.exceptions.RayActorError:
            _end(nodes)
            return _LOST
        except ray.exceptions.RayError as error:
            _end(nodes)
            raise _failure(error) from error
    except StokerError as error:
        _say(str(error))
        return error.exit_code
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):  # while it was checked
        return _LOST
    finally:
        remove_placement_group(group)


def _check(group: Any, needs: Needs, program: str, folder: str) -> None:
    """Raises BadInput if a node lacks what a launcher needs, which does not get better by starting again.

    Raises StokerError if a node cannot be asked now.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # Not by the actors: for Ray, one whose class cannot be imported and that has a `__repr__` is lost.
    asked = ray.remote(num_cpus=0, max_retries=0)(_lacking)
    answers = [
        asked.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, number)).remote(
            program, folder
        )
        for number in range(needs.nodes)
    ]
    for number, answer in enumerate(answers):
        failed: StokerError | None
        try:
            failed = BadInput(lacking) if (lacking := ray.get(answer)) else None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
            raise
        except ray.exceptions.RayError as error:
            failed = _failure(error)
        if failed is not None:
            node = ray_cluster.shown(ray_cluster.node_of(group, number))
            raise type(failed)(f"node {number}, {node}: {failed}")


def _failure(error: Exception) -> StokerError:
    """What an error of Ray's means for the job: BadInput only if a node lacks stoker, or a part of it.

    Anything else may be over the next time: a URL that does not answer, a folder of a network that does not,
    a node without memory.
    """
    from ray.exceptions import RayTaskError, RuntimeEnvSetupError

    if isinstance(error, RayTaskError) and isinstance(error.cause, ImportError):
        return BadInput(f"stoker cannot be run there: {ray_cluster.cause(error)}")
    has_trace = isinstance(error, RayTaskError | RuntimeEnvSetupError)
    return StokerError(ray_cluster.cause(error) if has_trace else first_line(error))


def _lacking(program: str, folder: str) -> str:
    """What is missing on this node; called by Ray also where stoker is."""
    importlib.import_module("stoker.launch.ray_nodes")
    if folder and not _is_folder(folder):
        return f"the folder {folder} does not exist there; to send it, add --option working-dir=."
    return "" if shutil.which(program) else f"{program} does not exist there"


def _is_folder(path: str) -> bool:
    """Unlike `Path.is_dir`, it takes no failing disk for a folder that does not exist. Raises OSError."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False


def _wait(nodes: Sequence[Any], told: Sequence[int]) -> int:
    """Wait until all launchers have ended; returns the highest exit code, or that for bad input.

    If one ends with bad input, the others are ended: they would wait for it. Raises RayActorError if a node
    is lost.
    """
    import ray

    passed_on, refused = 0, 0.0
    while True:
        codes = ray.get([node.ended.remote() for node in nodes])
        if all(code is not None for code in codes):
            return EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else int(max(codes))
        if EXIT_BAD_INPUT in codes:
            refused = refused or time.monotonic()
            if time.monotonic() - refused > _PARTING:
                _end(nodes)
                return EXIT_BAD_INPUT
        if len(told) > passed_on:
            passed_on = len(told)
            ray.get([node.tell.remote() for node in nodes])
        time.sleep(_LOOK)


def _end(nodes: Sequence[Any]) -> None:
    """End the remaining launchers: they all train one run."""
    import ray

    for node in nodes:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(node.end.remote(), timeout=2 * _ENDING)


def _wait_for_last_lines() -> None:
    """Wait until the launchers' last output has arrived: Ray delivers it with a delay, or never.

    This process's output is the file in which Ray keeps it.
    """
    begun = changed = time.monotonic()
    size = os.fstat(sys.stdout.fileno()).st_size
    while (now := time.monotonic()) - changed < _QUIET and now - begun < _LAST_LINES:
        time.sleep(_LOOK)
        before, size = size, os.fstat(sys.stdout.fileno()).st_size
        if size != before:
            changed = now


def _say(text: str) -> None:
    sys.stderr.write(f"stoker: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """The job's entrypoint."""
    parser = argparse.ArgumentParser(prog="stoker.launch.ray_nodes", description=__doc__)
    for name in ("nodes", "cpus", "gpus", "memory", "retries"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--name", required=True)
    parser.add_argument("--folder", default="")
    parser.add_argument("--logs", nargs=2, metavar=("URL", "JOB"), help="where to upload the output")
    parser.add_argument("command", nargs="+")
    given = vars(parser.parse_args())
    name, command, folder, logs = (given.pop(key) for key in ("name", "command", "folder", "logs"))
    job = finding.folder(logs[0]) / jobs.FOLDER / logs[1] if logs else None
    with job_uploader.beside(job, Path("/proc/self/fd/1").resolve()):  # the file that Ray keeps
        code = run(name, Needs(**given), command, folder)
    sys.exit(code)


if __name__ == "__main__":
    main()
