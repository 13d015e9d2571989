"""The target `local`: a foreground job on this machine, without a record."""

from __future__ import annotations

import os
import shlex

import psutil
from stoker import machine
from stoker.errors import BadInput
from stoker.launch import jobspec
from stoker.launch.jobspec import JobSpec


def check(spec: JobSpec) -> None:
    """Raises BadInput if this machine lacks the requested resources."""
    jobspec.check(spec)
    gpus, cores = len(machine.visible_gpus()) if spec.gpus else 0, os.cpu_count() or 1
    total = psutil.virtual_memory().total
    if spec.gpus > gpus:
        raise BadInput(
            f"--gpus {spec.gpus}: this machine has {gpus or 'none'}; omit it, or use a cluster with --on"
        )
    if spec.cores > cores and spec.cpus is not None:
        raise BadInput(f"--cpus {spec.cpus}: this machine has {cores}")
    if spec.memory is not None and spec.memory > total:
        have = jobspec.shown_memory(total)
        raise BadInput(f"--memory {jobspec.shown_memory(spec.memory)}: this machine has {have}")
    if spec.options:
        raise BadInput(f"--option {next(iter(spec.options))} is for clusters: omit it, or add --on")


def environment(spec: JobSpec) -> dict[str, str]:
    """The variables of a local job: its own, and those that limit it to its cores and GPUs."""
    found = dict(spec.environment)
    if spec.cpus is not None:
        found.setdefault("OMP_NUM_THREADS", str(spec.threads))
    if spec.gpus:
        found.setdefault("CUDA_VISIBLE_DEVICES", ",".join(machine.visible_gpus()[: spec.gpus]))
    return found


def render(spec: JobSpec) -> str:
    """The job as a shell command."""
    variables = [f"{name}={value}" for name, value in environment(spec).items()]
    return shlex.join([*(["env", *variables] if variables else []), *spec.command]) + "\n"
