"""A Ray cluster whose machines are raylets of this one, one CPU each."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

_FAST = {  # a machine that is gone refuses at once; one that is slow answers late
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 20000,
    "health_check_failure_threshold": 3,
}  # fmt: skip


class Machines:
    """The head alone, until others join.

    Args:
        dashboard: whether it has the one that jobs are handed to.
    """

    def __init__(self, *, dashboard: bool = False) -> None:
        # By its folder Ray's own jobs tell a cluster from the others on this machine.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        head = {
            "num_cpus": 1, "temp_dir": str(self.folder), "include_dashboard": dashboard, "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,  # its default is one port for all clusters of a machine
            "_system_config": _FAST,
        }  # fmt: skip
        # Ray writes the address to its usual folder too, which only its first use on a machine creates.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        (self.folder / "ray_current_cluster").write_text(self.address, encoding="utf-8")

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def dashboard(self) -> str:
        return f"http://{self.cluster.head_node.webui_url}"

    def join(self, cpus: int = 1, **environment: str) -> Any:
        """One more machine, with variables of its own."""
        return self.cluster.add_node(
            num_cpus=cpus, wait=True, temp_dir=str(self.folder), env_vars=environment
        )

    def leave(self, node: Any) -> None:
        """One machine less."""
        self.cluster.remove_node(node, allow_graceful=False)

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)


M = TypeVar("M", bound=Machines)


@contextlib.contextmanager
def started(made: Callable[[], M]) -> Iterator[M]:
    """Within this block the cluster is there. Ray takes the answer to SIGTERM, which is given back."""
    answer = signal.getsignal(signal.SIGTERM)
    machines = made()
    try:
        yield machines
    finally:
        machines.cluster.shutdown()
        ray.shutdown()
        shutil.rmtree(machines.folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, answer)
