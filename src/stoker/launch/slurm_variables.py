"""The environment that Slurm's commands get from the shell of who calls stoker.

For sbatch a variable SBATCH_... is worth more than the script, and the job inherits everything else. Within
a job, that is also what describes this job, which srun would take for options of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from stoker.launch.jobspec import JobSpec

_OWN = "SBATCH_"
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_")
_CONFIGURES = ("SLURM_CONF", "SLURM_DEBUG_FLAGS", "SLURM_JWT", "SLURM_SACK_", "SLURM_TIME_")
"""Variables of Slurm that do not describe a job."""
_OF_OTHERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
"""Variables with which people set what the other commands list, and how."""
_OTHERWISE = {
    "SBATCH_GPUS": "gpus-per-node", "SBATCH_GPUS_PER_TASK": "gpus-per-node",
    "SBATCH_JOB_NAME": "job-name", "SBATCH_MEM_PER_CPU": "mem", "SBATCH_MEM_PER_GPU": "mem",
    "SBATCH_MEM_PER_NODE": "mem", "SBATCH_REQ_SWITCH": "switches", "SBATCH_TIMELIMIT": "time",
}  # fmt: skip
"""Variables that are not called as the setting that they are, or that contradict another one."""
_BREAKING = (
    "SBATCH_ARRAY_INX", "SBATCH_CPUS_PER_GPU", "SBATCH_ERROR", "SBATCH_EXPORT", "SBATCH_NO_REQUEUE",
    "SBATCH_WAIT",
)  # fmt: skip
"""With these a job could not resume, would lack its variables, or would not be what was asked for."""


def for_sbatch(spec: JobSpec, settings: Collection[str], here: Mapping[str, str]) -> dict[str, str]:
    """The variables that sbatch gets.

    Args:
        settings: the names of the script's own settings, which hold.
        here: the variables of this process.
    """
    within = "SLURM_JOB_ID" in here

    def dropped(name: str) -> bool:
        if name == "SBATCH_GRES":
            return bool(spec.gpus) and "gpu" in here[name]
        if name.startswith(_OWN):
            return name in _BREAKING or _setting(name) in settings
        of_a_job = within and name.startswith(_OF_A_JOB)
        return of_a_job and not name.startswith(_CONFIGURES) and name not in spec.passed

    return {name: value for name, value in here.items() if not dropped(name)}


def for_others(here: Mapping[str, str]) -> dict[str, str]:
    """The variables that squeue, scancel and the like get: they must not leave out a job, or ask back."""
    return {name: value for name, value in here.items() if not name.startswith(_OF_OTHERS)}


def read(given: Mapping[str, str]) -> list[str]:
    """The variables, of those that sbatch gets, that it reads as settings."""
    return sorted(name for name in given if name.startswith(_OWN))


def _setting(name: str) -> str:
    """The setting that a variable is worth: SBATCH_PARTITION is `partition`."""
    return _OTHERWISE.get(name) or name.removeprefix(_OWN).lower().replace("_", "-")
