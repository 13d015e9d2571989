"""The rank of this process, and the size of its launch.

All other code receives a `World`, except for what runs before or beside it: `supervision` and `launch`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from stoker import supervision

PLANNED = "STOKER_PLANNED"
PLANNED_RANK = "STOKER_PLANNED_RANK"
"""Environment variables for planning ranks that do not exist, see `World.planned`."""
_OF_A_LAUNCH = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "MASTER_", "TORCHELASTIC_", supervision.FOLDER,
)  # fmt: skip
_OF_A_SCHEDULER = (
    "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "TORCHELASTIC_RUN_ID", "PBS_JOBID", "LSB_JOBID",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size` processes, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of this run on this machine."""
    machines: int = 1
    """Machines of this launch, each with as many ranks as this one where the launcher does not say more."""
    launch: str = ""
    """Identifies the launch, with the same value on all its ranks; empty for a single process."""
    job: str = ""
    """Identifies a job across its relaunches, if its launcher named it."""
    planned: int = 0
    """For `stoker plan`, whose ranks do not exist: the bytes of memory that each would have; otherwise 0."""
    planned_rank: int = 0
    """The planned rank, whose share of the model this process builds; otherwise it acts as rank 0."""

    @classmethod
    def current(cls) -> World:
        """Read the place from the variables of torchrun or a similar launcher; without them, size is 1.

        A rank whose launcher says nothing of its machine has that to itself, as in Kubeflow's PyTorchJob.
        """
        environment = os.environ
        size = int(environment.get("WORLD_SIZE", "1"))
        together = size if "LOCAL_RANK" in environment else 1
        local_size = int(environment.get("LOCAL_WORLD_SIZE", str(together)))
        job = environment.get("TORCHELASTIC_RUN_ID", "none")
        parts = (
            job,
            environment.get("TORCHELASTIC_RESTART_COUNT", ""),
            environment.get("MASTER_ADDR", ""),
            environment.get("MASTER_PORT", ""),
        )
        return cls(
            rank=int(environment.get("RANK", "0")),
            size=size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_size=local_size,
            machines=int(environment.get("GROUP_WORLD_SIZE") or math.ceil(size / local_size)),
            launch="/".join(parts) if size > 1 else "",
            job="" if job == "none" else job,
            planned=int(environment.get(PLANNED, "0")),
            planned_rank=int(environment.get(PLANNED_RANK, "0")),
        )


def environment_of_no_rank() -> dict[str, str]:
    """This process's environment without the variables that describe its rank and launch."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCH)}


def agents_store() -> tuple[str, int] | None:
    """The address and port of the store of torchrun's agents; None if another launcher started this rank."""
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or supervision.FOLDER in environment:
        return None
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def is_unattended() -> bool:
    """Whether a launcher or scheduler started this process, and may start it again."""
    return any(name in os.environ for name in _OF_A_SCHEDULER) or World.current().size > 1


def comes_one_by_one() -> bool:
    """Whether Kubernetes started this process: the pods of a job start, and are replaced, one by one.

    The machines of a job of Slurm or Ray start together, also where those run in pods.
    """
    by = [name for name in _OF_A_SCHEDULER if name in os.environ]
    return by == ["KUBERNETES_SERVICE_HOST"]


def tasks_of_srun() -> int:
    """The number of processes that srun has started with this command; 1 if another launcher has."""
    environment = os.environ
    if "RANK" in environment or "RAY_JOB_ID" in environment:
        return 1
    given = environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(given) if given.isdecimal() else 1


def slurm_job() -> str:
    """A description of the Slurm job of this process; empty outside one."""
    environment = os.environ
    number = environment.get("SLURM_JOB_ID", "")
    if not number:
        return ""
    node, nodes = environment.get("SLURM_NODEID", "0"), environment.get("SLURM_JOB_NUM_NODES", "1")
    return f"Slurm job {number}, on node {node} of {nodes}"
