"""What runs next to a rank on a machine of a Ray cluster: its host, an actor.

The host starts the training process, which is the same as on a single machine (see `local`), and forwards its
messages; Ray manages only the host. So a trial that kills its process does not kill the host, the next trial
finds the libraries imported, and no process outlives its host, which ends with the controller or its node.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker import machine
from stoker.tune import local
from stoker.tune.local import Function, Over
from stoker.tune.trial import Report, TrialJob

_BEAT = 1.0  # seconds after which a host answers even if its process has sent nothing
_FORGOTTEN = 20.0  # seconds without a call after which a host ends its process and itself


@dataclass(frozen=True)
class HostPlace:
    """The location of a host."""

    node: str
    address: str
    port: int
    """A free port there."""
    gpus: tuple[str, ...]
    """The GPUs that Ray assigned to it."""


class Host:
    """Starts the process of a rank next to itself and forwards its messages. Its methods run in threads.

    Args:
        preload: modules imported before the first trial, in addition to torch.
        folder: the controller's working directory, to which a recipe's relative paths refer.
        environment: variables passed on from the controller.
    """

    def __init__(self, preload: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # set by Ray; `start` shares out the cores
        os.environ.update(environment)
        if folder.is_dir():
            os.chdir(folder)
        local.warm_up(preload)
        self._rank: local.Rank | None = None
        self._one_at_a_time = threading.Lock()
        self._asked = time.monotonic()
        threading.Thread(target=self._end_when_forgotten, name="end-when-forgotten", daemon=True).start()

    def place(self) -> HostPlace:
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", ()))
        return HostPlace(context.get_node_id(), ray.util.get_node_ip_address(), machine.free_port(), gpus)

    def start(self, function: Function, job: TrialJob, environment: Mapping[str, str], shares: int) -> None:
        """Start the process; the previous one has ended."""
        self._asked = time.monotonic()
        self._rank = local.Rank(function, job, environment, shares, f"trial-{job.number}")

    def hear(self) -> tuple[list[Report], Over | None]:
        """Its next reports, perhaps none, and how it ended, or None while it runs. Waits at most a second.

        The wait is short because Ray lets the actors of a killed controller finish their current call.
        """
        assert self._rank is not None
        self._asked = time.monotonic()
        multiprocessing.connection.wait(self._rank.events, _BEAT)
        self._asked = time.monotonic()
        with self._one_at_a_time:
            if self._rank.alive:
                return self._rank.heard(), None
            return self._rank.heard(), self._rank.over()

    def answer(self, decision: str, save: bool) -> None:
        if self._rank is not None:
            self._rank.answer(decision, save=save)

    def send(self, number: int) -> None:
        """Send the process a signal."""
        with self._one_at_a_time:
            if self._rank is not None:
                self._rank.signal(signal.Signals(number))

    def end(self) -> Over | None:
        """Kill the process; returns how it had ended if it had already."""
        assert self._rank is not None
        with self._one_at_a_time:
            before = None if self._rank.alive else self._rank.over()
            self._rank.signal(signal.SIGKILL)
            self._rank.over()
        return before

    def _end_when_forgotten(self) -> None:
        """End this host and its process once no controller calls, as it may resume the trial elsewhere."""
        while True:
            time.sleep(_BEAT)
            forgotten = time.monotonic() - self._asked > _FORGOTTEN
            with self._one_at_a_time:
                if forgotten and self._rank is not None and self._rank.alive:
                    os._exit(1)  # which also ends the process
