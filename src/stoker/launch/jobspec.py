"""What a job is, whatever runs it: a command, the resources per machine, and how often it is retried.

A target (`launch/targets.py`) translates a spec into its own form: an sbatch script, a manifest.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker import redaction, words
from stoker.errors import BadInput

log = logging.getLogger("stoker")

# No user argument can contain this character: the system would not accept it.
RENDEZVOUS = "\0rendezvous\0"
"""In a command: the HOST:PORT where the machines of the job meet, which the target knows."""
ELEMENT = "\0element\0"
"""In a command: the number of this element of a job array, from 0."""

_LEAST_MEMORY = 2**20  # bytes
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SETTING = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job, on one machine or several equal ones."""

    name: str
    """Its name in the cluster's queue."""
    command: tuple[str, ...]
    """What each machine runs, once; can contain `RENDEZVOUS` and `ELEMENT`."""
    folder: Path
    """The working directory."""
    nodes: int = 1
    processes: int = 1
    """Ranks per machine, which the command starts itself."""
    gpus: int = 0
    """GPUs per machine."""
    cpus: int | None = None
    """Cores per machine, if given; see `cores`."""
    memory: int | None = None
    """Bytes per machine; None for the target's default."""
    time: float | None = None
    """Seconds after which it is ended; None for the target's limit."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are recorded with the job."""
    passed: tuple[str, ...] = ()
    """Names of variables that are passed to the job without recording their values."""
    retries: int = 0
    """How often it may fail and be started again. Preemption does not count as a failure."""
    elements: int = 0
    """Jobs of an array, each with its own number; 0 for a job that is not an array."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The target's own settings, under its own names."""

    @property
    def cores(self) -> int:
        """Cores per machine; default: one per rank."""
        return self.cpus or self.processes

    @property
    def threads(self) -> int:
        """Cores per rank."""
        return max(1, self.cores // self.processes)

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON; see `from_json`."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> JobSpec:
        """The spec that `to_json` returned; fields of a newer version are ignored."""
        tuples = {key: tuple(known[key]) for key in ("command", "passed")}
        return cls(**{**known_to(cls, known), **tuples, "folder": Path(known["folder"])})


def known_to(of: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that a dataclass has: a newer version may have written more."""
    names = {one.name for one in dataclasses.fields(of)}
    return {key: value for key, value in record.items() if key in names}


def check(spec: JobSpec) -> None:
    """Raises BadInput for what no target could run."""
    if spec.gpus and spec.gpus < spec.processes:
        raise BadInput(
            f"--nproc {spec.processes}: each rank needs a GPU, but --gpus is {spec.gpus}; "
            f"use --gpus {spec.processes}, or a smaller --nproc"
        )
    if spec.cores < spec.processes:
        raise BadInput(
            f"--cpus {spec.cores} for --nproc {spec.processes}: each rank needs at least one core: use "
            f"--cpus {spec.processes} or more"
        )


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of a cluster."""

    count: int
    gpus: int
    cpus: int
    memory: int
    """Bytes."""


def check_room(spec: JobSpec, have: Sequence[Nodes], where: str, instead: str) -> None:
    """Raises BadInput for resources that no node has, or that too few nodes have.

    Args:
        where: whose nodes they are.
        instead: what to do about it.
    """
    asked = {"gpus": spec.gpus, "cpus": spec.cores, "memory": spec.memory or 0}
    for what, amount in asked.items():
        most = max(getattr(node, what) for node in have)
        if amount > most:
            said, there = (shown_memory(n) if what == "memory" else str(n) for n in (amount, most))
            raise BadInput(f"--{what} {said}: a node of {where} has at most {there}; {instead}")
    fitting = sum(n.count for n in have if all(getattr(n, what) >= x for what, x in asked.items()))
    if spec.nodes > fitting:
        raise BadInput(
            f"--nodes {spec.nodes}: {where} has {words.counted(fitting, 'node')} with the requested "
            f"resources; {instead}"
        )


def memory(text: str) -> int:
    """`64GB`, `512M` or `1.5TiB` in bytes; units are powers of 1024, as in schedulers.

    Raises BadInput.
    """
    amount = words.parsed_size(text)
    if amount < _LEAST_MEMORY:
        raise BadInput(f"--memory {text}: give the memory per machine, such as 64GB or 512MB")
    return amount


def shown_memory(count: int) -> str:
    """Bytes as `64G` or `512M`, in powers of 1024; rounded up."""
    mebibytes = -(-count // 2**20)
    return f"{mebibytes // 1024}G" if mebibytes % 1024 == 0 else f"{mebibytes}M"


def environment(
    given: Sequence[str], here: Mapping[str, str], *, stored: bool = False
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Parse `--env`: variables that are recorded, and names of those that are only passed on.

    Args:
        given: NAME=VALUE, or just NAME for a variable that is already set.
        here: the variables of this process.
        stored: whether the cluster has the values of those that are only passed on.

    Raises BadInput, also for a value that looks like a secret, as it would be written to a file.
    """
    written, passed = {}, []
    for text in given:
        name, equals, value = text.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise BadInput(f"--env {text}: give NAME=VALUE, or the NAME of a variable that is set")
        if not equals:
            if name not in here and not stored:
                raise BadInput(f"--env {name}: not set; export it first, or give {name}=VALUE")
            if name not in here:
                log.warning("--env %s: not set here, so the job starts only if the Secret has it", name)
            passed.append(name)
        elif redaction.is_secret_variable(name, value):
            raise BadInput(
                f"--env {name}=...: this looks like a secret, and would be written to a file; "
                f"export {name} and use --env {name}"
            )
        else:
            written[name] = value
    return written, tuple(passed)


def settings(given: Sequence[str]) -> dict[str, str]:
    """Parse `--option`: KEY=VALUE, or just KEY for a switch. Raises BadInput."""
    found = {}
    for text in given:
        key, _, value = text.partition("=")
        key = key.strip().lstrip("-")
        if not _SETTING.fullmatch(key) or key in found:
            why = "it is given twice" if key in found else "give KEY=VALUE, such as partition=gpu"
            raise BadInput(f"--option {text}: {why}")
        if not value.isprintable():
            raise BadInput(f"--option {key}: its value contains a line break or another control character")
        found[key] = value
    return found
