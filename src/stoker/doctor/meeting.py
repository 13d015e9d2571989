"""Whether ranks on this machine can connect: starts a process group as a training would.

This runs in a separate process, with a separate folder for temporary files: if it hangs in C code, it is
ended together with everything it has started.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from stoker import machine, signals, storage
from stoker.doctor.findings import Finding, ok, problem, said
from stoker.errors import StokerError
from stoker.launch import local
from stoker.world import World, environment_of_no_rank

LIMIT = 120.0  # seconds for the ranks, from start to end
_PROGRAM = "import sys; from stoker.doctor import meeting; sys.exit(meeting.main(*sys.argv[1:]))"
_SHORT = "sd-"  # for a folder with sockets, whose full paths are limited to about a hundred characters
_TOO_LONG = "AF_UNIX path too long"
_NUMBERS = 2**18  # summed over ranks: 1 MiB
_HINTS = {
    "gloo": "set GLOO_SOCKET_IFNAME to an interface of this machine (`ip link` lists them), such as lo",
    "nccl": "NCCL_DEBUG=INFO shows more, and NCCL_P2P_DISABLE=1 avoids a bad link between GPUs",
}
_NAMES = {"gloo": "gloo", "nccl": "NCCL, one GPU each,"}


def check(limit: float = LIMIT) -> Iterator[Finding]:
    """Two ranks with gloo; and, if there are several GPUs, one rank per GPU with NCCL."""
    yield meet("gloo", 2, limit)
    gpus = len(machine.visible_gpus())
    if gpus > 1:
        yield meet("nccl", gpus, limit)


def meet(backend: str, ranks: int, limit: float) -> Finding:
    """Start ranks and make them compute a sum; `limit`: seconds from their start to their end."""
    who = f"{ranks} ranks with {_NAMES[backend]}"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=_SHORT) as folder:
        answer, output = Path(folder) / "answer.json", Path(folder) / "output.txt"
        process = _started(backend, ranks, answer, output)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return problem(f"{who} did not connect within {limit:.0f} s: {_HINTS[backend]}")
        finally:
            _end(process)
        told = storage.read_json(answer)
        last = output.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if "seconds" in told:
        seconds = time.monotonic() - begun
        return ok(f"{who} connect in {told['seconds']:.2f} s, or {seconds:.1f} s with their start and end")
    reason = told.get("error") or last or f"they ended with exit code {process.returncode}"
    hint = "set TMPDIR to a folder with a shorter path" if _TOO_LONG in reason else _HINTS[backend]
    return problem(f"{who} do not connect ({reason}): {hint}")


def _started(backend: str, ranks: int, answer: Path, output: Path) -> subprocess.Popen[bytes]:
    """The process that starts the ranks."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, backend, str(ranks), str(answer)],
            env=_environment(backend, str(output.parent)),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,  # Ctrl-C is only for this process
        )  # fmt: skip


def _environment(backend: str, folder: str) -> Mapping[str, str]:
    """This process's environment without that of a rank. With gloo, GPUs are hidden from the ranks."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    return {**environment_of_no_rank(), **hidden, "TMPDIR": folder}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with everything it has started, and wait until they are gone."""
    if process.poll() is None:
        family = local.kill_all_of(psutil.Process(process.pid))
        process.wait()
        psutil.wait_procs(family, timeout=5)


def _rank(backend: str, answer: str) -> int:
    """What each rank does."""
    import torch
    import torch.distributed as dist
    from stoker import distributed
    from stoker.engine import device as devices

    world = World.current()
    begun = time.perf_counter()
    device = devices.pick(world) if backend == "nccl" else torch.device("cpu")
    distributed.join(world, backend)
    total = torch.ones(_NUMBERS, device=device)
    dist.all_reduce(total)
    if not torch.all(total == world.size):
        raise RuntimeError(f"the sum of {world.size} ones is {total[0].item()}")
    if world.rank == 0:
        storage.write_json(Path(answer), {"seconds": time.perf_counter() - begun})
    return 0


def main(backend: str, ranks: str, answer: str) -> int:
    """The process that starts the ranks; their report is in the file `answer`."""
    if (end_with_parent := signals.at_parents_death(signal.SIGKILL)) is not None:
        end_with_parent()
    try:
        return local.run(_rank, (backend, answer), nproc=int(ranks))
    except StokerError as error:
        storage.write_json(Path(answer), {"error": getattr(error, "brief", "") or said(error)})
        return error.exit_code
