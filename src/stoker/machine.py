"""Facts about this machine: hardware, resource limits, ports."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import platform
import random
import socket
import subprocess
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import psutil


def hardware() -> dict[str, Any]:
    """This machine: system, processor, cores, memory in bytes, NVIDIA GPUs with driver and CUDA."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **_gpus(),
    }


def share_cores(processes: int) -> None:
    """Limit this process to its share of the cores, unless OMP_NUM_THREADS is set."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def keep_cublas_workspaces() -> None:
    """Make cuBLAS deterministic with fixed workspaces, unless the environment already configures them.

    cuBLAS reads the variable at its first use. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    """
    os.environ.setdefault(_CUBLAS, ":4096:8")


def has_cublas_workspaces() -> bool:
    """Whether the environment configures cuBLAS's workspaces."""
    return _CUBLAS in os.environ


_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The number of cores that this process may use, given its affinity and its cgroup's limit."""
    everywhere = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    return max(1, min(mine, math.ceil(limits().cores or mine)))


class Limits(NamedTuple):
    """The resource limits of a container or a scheduler's job; None: unlimited."""

    cores: float | None
    memory: int | None
    """Bytes."""


def limits(membership: Path = _MEMBERSHIP, mounted: Path = _CGROUPS) -> Limits:
    """The tightest limits of this process's cgroup and its parents, in cgroup version 1 or 2.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, `cpu.max` and `memory.max`; in version 1
    `cpu.cfs_quota_us` and `memory.limit_in_bytes`.
    """
    cores: list[float] = []
    memory: list[int] = []
    for controllers, path in _cgroups(membership):
        root = mounted / controllers
        for folder in _up(root, path):
            quota = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us"),
            ]  # fmt: skip
            if len(quota) == 2 and quota[0] not in ("max", "-1"):
                cores.append(int(quota[0]) / int(quota[1]))
            most = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
            if most and most[0] != "max" and int(most[0]) < psutil.virtual_memory().total:
                memory.append(int(most[0]))
    return Limits(min(cores, default=None), min(memory, default=None))


def _cgroups(membership: Path) -> list[tuple[str, str]]:
    """The cgroups of this process: the controllers (empty in version 2) and the path."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    return [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]


def _up(root: Path, path: str) -> list[Path]:
    """A cgroup's folder and its parents; in a container some of them are not visible."""
    folder = root / path.lstrip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(root))]


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []


def processor() -> str:
    """The model of the CPU; Python's own `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> dict[str, Any]:
    """The names and memory of the NVIDIA GPUs, their driver, and the newest CUDA version that it supports."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "gpus": [f"{pynvml.nvmlDeviceGetName(gpu)}, {_mebibytes(gpu)} MiB" for gpu in handles],
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
    except pynvml.NVMLError:  # no driver, as on most machines without a GPU
        return {"gpus": []}


def _mebibytes(gpu: Any) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) // 2**20


def output(command: list[str]) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORTS = (10_000, 20_000)  # above, launchers of Slurm jobs meet, and Kubernetes has the ports of its nodes
_ROOM = 2000  # ports, of which many can be taken
_TRIES = 200  # of such ports, before the system is asked for any
_given: deque[int] = deque(maxlen=_ROOM // 2)


def free_port(ephemeral: Path = _EPHEMERAL) -> int:
    """A free port of this machine; another one with each call.

    It is below those that the system gives to connections and to port 0, if there is room: one of these might
    be given to another process before it is used.
    """
    ports = _below(ephemeral)
    chosen = random.SystemRandom().sample(ports, _TRIES) if ports else []  # the run's own state stays
    for port in [*chosen, *[0] * _TRIES]:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            found = int(free.getsockname()[1])
            if found not in _given:
                _given.append(found)
                return found
    raise OSError(errno.EADDRINUSE, "no port of this machine is free")


def _below(ephemeral: Path) -> range:
    """The ports below those of the system; empty where there are too few, or on systems other than Linux."""
    words = _words(ephemeral)
    first, end = _PORTS
    ports = range(first, min(end, int(words[0]) if words else 0))
    return ports if len(ports) >= _ROOM else range(0)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as named in CUDA_VISIBLE_DEVICES; does not load torch."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    if visible is None:
        return [str(number) for number in range(count)]
    return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
