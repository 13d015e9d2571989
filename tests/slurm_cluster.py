"""A Slurm of its own on this machine: munged, slurmctld, and a slurmd a node, all on loopback."""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_START_TIMEOUT = 120.0
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=60
MessageTimeout=60
BatchStartTimeout=120
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10
PartitionName=short Nodes=ALL MaxTime=5
PartitionName=down Nodes=ALL State=DOWN
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 Gres=gpu:2"


def missing() -> list[str]:
    """The programs that are not installed, of those that it takes."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


@contextmanager
def cluster(nodes: int) -> Iterator[Path]:
    """Start it; yields its configuration, for SLURM_CONF. Each node has two cores and two
    GPUs, whatever this machine has.

    Jobs of the partition `high` take the nodes from those of `low`.
    """
    folder = Path(tempfile.mkdtemp(prefix="stoker-slurm-"))
    names = [f"n{number}" for number in range(1, nodes + 1)]
    for name in ("munge", "state", *names):
        (folder / name).mkdir(mode=0o700)
    config = _configure(folder, names)
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = ("munged", "--foreground", "--force", f"--key-file={folder}/munge/key", *(
        f"--{what}={folder}/munge/{what.removesuffix('-file')}"
        for what in ("socket", "log-file", "pid-file", "seed-file")
    ))  # fmt: skip
    commands = [munge, ("slurmctld", "-D", "-c"), *(("slurmd", "-D", "-N", name) for name in names)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "output.txt").open("ab") as output:
            for command in commands:
                daemons.append(subprocess.Popen(
                    command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=output, start_new_session=True,
                ))  # fmt: skip
                if command is munge:
                    _wait((folder / "munge" / "socket").exists, daemons, folder)
        _wait(lambda: _idle(environment) == nodes, daemons, folder)
        yield config
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, names: list[str]) -> Path:
    """Write what the daemons read; returns Slurm's configuration."""
    host = platform.node()
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    devices = ("/dev/null", "/dev/zero")  # any will do: nothing computes on them
    gpus = "".join(f"Name=gpu File={device}\n" for device in devices)
    (folder / "gres.conf").write_text(gpus, encoding="ascii")
    nodes = [_NODE.format(name=name, host=host, port=free_port()) for name in names]
    config = folder / "slurm.conf"
    config.write_text(
        _CONFIG.format(
            host=host, port=free_port(), user=getpass.getuser(), folder=folder, nodes="\n".join(nodes)
        ),
        encoding="ascii",
    )
    return config


def _idle(environment: dict[str, str]) -> int:
    """Nodes that wait for jobs."""
    command = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--responding"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def _wait(until: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not until():
        said = (folder / "output.txt").read_text(errors="replace")
        assert all(daemon.poll() is None for daemon in daemons), f"Slurm did not start:\n{said}"
        assert time.monotonic() < deadline, f"Slurm did not start:\n{said}"
        time.sleep(0.05)
