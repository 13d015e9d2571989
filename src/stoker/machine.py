"""What this machine is."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

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
    """Let this process compute with its share of the cores, unless OMP_NUM_THREADS says how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def keep_cublas_workspaces() -> None:
    """Let cuBLAS give the same bits each time, by workspaces of its own; what the environment says stands.

    It looks when it is first used. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    """
    os.environ.setdefault(_CUBLAS, ":4096:8")


def has_cublas_workspaces() -> bool:
    """Whether the environment says which workspaces cuBLAS has."""
    return _CUBLAS in os.environ


def processor() -> str:
    """The model of the CPU; Python's own `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> dict[str, Any]:
    """The NVIDIA GPUs by name and memory, their driver, and the newest CUDA that it can run."""
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
    except pynvml.NVMLError:  # there is no driver, as on most machines without a GPU
        return {"gpus": []}


def _mebibytes(gpu: Any) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) // 2**20


def output(command: list[str]) -> str | None:
    """What a command writes; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without loading torch."""
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
