"""The processor, memory, and the limits of a process."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
from stoker import machine, words
from stoker.doctor.findings import Finding, note, ok, problem

_SHARED = Path("/dev/shm")
_LEAST_SHARED = 256 * 2**20  # bytes; Docker's default is 64 MiB
_FEW_FILES, _ENOUGH_FILES = 512, 4096
_RAISED = 65536  # recommended number of open files
_COMPILERS = ("cc", "gcc", "clang")


def check() -> Iterator[Finding]:
    """Processor and memory; open files; shared memory; a compiler."""
    yield ok(f"{machine.processor()}: {_cores()}; {_memory()}")
    usable, known = machine.usable_cores(), os.cpu_count() or 1
    if usable < known and "OMP_NUM_THREADS" not in os.environ:
        yield note(
            f"this process may use {usable} of {known} cores, but ranks share out threads for all of them: "
            f"export OMP_NUM_THREADS={usable}, divided by the number of ranks on this machine"
        )
    yield _open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if _SHARED.is_dir():
        yield _shared_memory()
    if "CC" not in os.environ and not any(map(shutil.which, _COMPILERS)):
        yield note("no C compiler found, which compile=true and kernels=liger need: install gcc")


def _cores() -> str:
    usable, known = machine.usable_cores(), os.cpu_count() or 1
    return words.counted(usable, "core") + (f" of {known}" if usable < known else "")


def _memory() -> str:
    memory, limit = psutil.virtual_memory(), machine.limits().memory
    said = f"{words.size(memory.total)} of memory, {words.size(memory.available)} free"
    return said if limit is None else f"{said}; this job or container may use {words.size(limit)} of it"


def _open_files(now: int, most: int) -> Finding:
    if now == resource.RLIM_INFINITY or now >= _ENOUGH_FILES:
        many = "any number of" if now == resource.RLIM_INFINITY else f"{now:,}"
        return ok(f"{many} files may be open at once")
    allowed = _RAISED if most == resource.RLIM_INFINITY else min(most, _RAISED)
    text = f"{now:,} files may be open at once, too few for many ranks and loader workers"
    if allowed <= now:
        hint = "have the limit on open files raised (/etc/security/limits.conf)"
    else:
        hint = f"`ulimit -n {allowed}` before training raises that"
    return problem(f"{text}: {hint}") if now < _FEW_FILES else note(f"{text}; {hint}")


def _shared_memory() -> Finding:
    """Used by loader workers to pass batches, and by NCCL between ranks on one machine."""
    disk = psutil.disk_usage(str(_SHARED))
    if disk.total < _LEAST_SHARED:
        return problem(
            f"{_SHARED} has {words.size(disk.total)}, too little for loader workers and NCCL: start the "
            "container with more (docker run --shm-size=8g; on Kubernetes an emptyDir of medium Memory)"
        )
    if disk.free < _LEAST_SHARED:
        return problem(
            f"{_SHARED} has {words.size(disk.free)} free, too little for loader workers and NCCL: "
            f"remove leftover files (`ls -l {_SHARED}`)"
        )
    return ok(f"{_SHARED}: {words.size(disk.free)} of shared memory free")
