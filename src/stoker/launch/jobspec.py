"""What a job is, whatever runs it: a command, what it needs on each machine, how often it may be tried.

A target (`launch/targets.py`) writes a spec in its own words: an sbatch script, a manifest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker import redaction, words
from stoker.duration import clock
from stoker.errors import BadInput

# No argument of a user's has such a character: the system would not take it.
RENDEZVOUS = "\0rendezvous\0"
"""In a command: HOST:PORT where the machines of the job meet, which the target knows."""
ELEMENT = "\0element\0"
"""In a command: the number of this element of an array of jobs, from 0."""

_LEAST_MEMORY = 2**20  # bytes
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SETTING = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job, of one machine or several alike."""

    name: str
    """What it is called in the cluster's queue."""
    command: tuple[str, ...]
    """What each machine runs, once; may have `RENDEZVOUS` and `ELEMENT` in it."""
    folder: Path
    """The working directory."""
    nodes: int = 1
    processes: int = 1
    """Ranks of each machine, which the command starts itself."""
    gpus: int = 0
    """Of each machine."""
    cpus: int | None = None
    """Cores of each machine, where they are told; see `cores`."""
    memory: int | None = None
    """Bytes of each machine; None for what the target gives by itself."""
    time: float | None = None
    """Seconds after which it is ended; None for what the target allows."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are written down with the job."""
    passed: tuple[str, ...] = ()
    """Names of variables whose values go with it and are written nowhere."""
    retries: int = 0
    """How often it may fail and be started again. Being preempted is no failure."""
    elements: int = 0
    """Jobs of an array, each with a number of its own; 0 for a job that is no array."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The target's own settings, under its own names."""

    @property
    def cores(self) -> int:
        """Cores of each machine: one a rank where nothing else is told."""
        return self.cpus or self.processes

    @property
    def threads(self) -> int:
        """Cores of each rank."""
        return max(1, self.cores // self.processes)

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON has it; see `from_json`."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> JobSpec:
        """The spec that `to_json` has said; what a newer version has said more is passed over."""
        tuples = {key: tuple(known[key]) for key in ("command", "passed")}
        return cls(**{**known_to(cls, known), **tuples, "folder": Path(known["folder"])})


def known_to(of: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record a dataclass has fields for: a newer version may have written more."""
    names = {one.name for one in dataclasses.fields(of)}
    return {key: value for key, value in record.items() if key in names}


def check(spec: JobSpec) -> None:
    """Refuse what no target could run. Raises BadInput."""
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


def memory(text: str) -> int:
    """`64GB`, `512M` or `1.5TiB` in bytes; units are powers of 1024, as schedulers take them.

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


def time_limit(text: str) -> float:
    """`4h` or `90min` in seconds. Raises BadInput."""
    try:
        return clock(text)
    except ValueError as error:
        raise BadInput(f"--time {error}") from error


def environment(given: Sequence[str], here: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What `--env` gives: variables that are written down, and names of those that are only passed on.

    Args:
        given: NAME=VALUE, or NAME alone for a variable that is set here already.
        here: the variables of this process.

    Raises BadInput: also for a value that looks like a secret, as it would stand in a file.
    """
    written, passed = {}, []
    for text in given:
        name, equals, value = text.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise BadInput(f"--env {text}: give NAME=VALUE, or the NAME of a variable that is set")
        if not equals:
            if name not in here:
                raise BadInput(f"--env {name}: not set; export it first, or give {name}=VALUE")
            passed.append(name)
        elif redaction.is_secret_name(name) or redaction.text(value) != value:
            raise BadInput(
                f"--env {name}=...: this looks like a secret, and would be written to a file; "
                f"export {name} and use --env {name}"
            )
        else:
            written[name] = value
    return written, tuple(passed)


def settings(given: Sequence[str]) -> dict[str, str]:
    """What `--option` gives, KEY=VALUE or KEY alone for a switch. Raises BadInput."""
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
