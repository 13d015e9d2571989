"""Who this process is among its peers: rank, size, local rank.

The one module that reads RANK, WORLD_SIZE and their kin; everything else is handed a `World`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PLANNED = "STOKER_PLANNED"
PLANNED_RANK = "STOKER_PLANNED_RANK"
"""The variables that say that ranks are not there, and which is planned, see `World.planned`."""
_OF_A_LAUNCH = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_",
    "TORCHELASTIC_",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of this run on this machine."""
    launch: str = ""
    """What all ranks of one launch share and no other launch has; empty for one process."""
    job: str = ""
    """What the relaunches of one job share, where its launcher gave it a name of its own."""
    planned: int = 0
    """Of ranks that are not there, as `stoker plan` has them: bytes of memory that each would have."""
    planned_rank: int = 0
    """The one of them whose share of the model this is; all else here is done as rank 0."""

    @classmethod
    def current(cls) -> World:
        """Read the place from the variables that torchrun and its kin set; alone without them."""
        known = os.environ.get
        size = int(known("WORLD_SIZE", "1"))
        job = known("TORCHELASTIC_RUN_ID", "none")
        parts = (
            job,
            known("TORCHELASTIC_RESTART_COUNT", ""),
            known("MASTER_ADDR", ""),
            known("MASTER_PORT", ""),
        )
        return cls(
            rank=int(known("RANK", "0")),
            size=size,
            local_rank=int(known("LOCAL_RANK", "0")),
            local_size=int(known("LOCAL_WORLD_SIZE", str(size))),
            launch="/".join(parts) if size > 1 else "",
            job="" if job == "none" else job,
            planned=int(known(PLANNED, "0")),
            planned_rank=int(known(PLANNED_RANK, "0")),
        )


def environment_of_no_rank() -> dict[str, str]:
    """This process's environment, without what says which rank of which launch it is."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCH)}


def slurm_job() -> str:
    """The Slurm job that this process is in, in words; empty outside of one."""
    known = os.environ.get
    number = known("SLURM_JOB_ID", "")
    if not number:
        return ""
    return f"Slurm job {number}, on node {known('SLURM_NODEID', '0')} of {known('SLURM_JOB_NUM_NODES', '1')}"
