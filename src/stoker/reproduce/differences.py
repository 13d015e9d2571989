"""The differences between the records of two runs, or of a run and this machine.

Pure functions over the contents of `provenance/`: packages, interpreter, machine. If equal bits cannot be
promised despite a difference, the reason is given: floating-point addition is not associative, and its
order depends on the processor, the GPU, the number of threads and the kernels of a build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stoker.redaction import REDACTED

Kind = Literal["package", "python", "machine", "variable"]

_LINE = re.compile(
    r"^(?:# )?(?P<name>[A-Za-z0-9][\w.\-]*)(?:==(?P<version>\S+)| @ (?P<url>\S+))(?: from (?P<folder>.+?))?"
    r"(?:\s+# content sha256:(?P<content>[0-9a-f]+))?$"
)
_KERNELS = re.compile(
    r"torch|triton|numpy|scipy|mkl|intel-openmp|nvidia-.+|deepspeed|liger-kernel|flash-attn"
)
_PYTHON = ("python", "implementation")
_MACHINE = ("system", "processor", "cores", "memory_bytes", "gpus", "driver", "cuda", "cudnn")
_COMPUTING = (
    "OMP_", "MKL_", "OPENBLAS_", "BLIS_", "CUBLAS_", "CUDNN_", "NCCL_", "TORCH", "PYTORCH_", "NVIDIA_TF32",
    "XLA_", "DNNL_", "ONEDNN_", "TRITON_", "PYTHONHASHSEED",
)  # fmt: skip
_OF_A_LAUNCH = (
    "TORCHELASTIC_",
    "TORCH_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "NCCL_SOCKET_",
    "NCCL_DEBUG",
    "NCCL_IB_HCA",
)


@dataclass(frozen=True)
class Difference:
    """One thing that differs."""

    kind: Kind
    name: str
    before: str | None
    """None if it did not exist."""
    now: str | None
    matters: str = ""
    """Why equal bits cannot be promised; empty if the difference is not known to matter."""


@dataclass(frozen=True)
class Locked:
    """A package in a lock."""

    name: str
    version: str
    """Its version, or the address that it is installed from."""
    folder: str
    """The folder that it is imported from, and its commit; empty if pip can install it."""
    content: str

    @property
    def said(self) -> str:
        folder = re.sub(r"(commit [0-9a-f]{12})[0-9a-f]+", r"\1", self.folder)
        return f"{self.version} from {folder}" if folder else self.version


def locked(lock: str) -> dict[str, Locked]:
    """The packages of a lock (`requirements.txt` of a run) by their normalised names (PEP 503)."""
    found = (_LINE.match(line.strip()) for line in lock.splitlines())
    each = [
        Locked(m["name"], m["version"] or m["url"], m["folder"] or "", m["content"] or "") for m in found if m
    ]
    return {re.sub(r"[-_.]+", "-", package.name).lower(): package for package in each}


def packages(before: str, now: str) -> list[Difference]:
    """The differences between two locks: versions, contents of the same version, and missing packages."""
    one, other = locked(before), locked(now)
    found = []
    for name in sorted({*one, *other}):
        was, is_ = one.get(name), other.get(name)
        said = (was.said if was else None, is_.said if is_ else None)
        if was and is_ and said[0] == said[1]:
            if not (was.content and is_.content) or was.content == is_.content:
                continue
            said = (
                f"{was.said} with content {was.content[:12]}",
                f"{is_.said} with content {is_.content[:12]}",
            )
        matters = "its kernels may add in a different order" if was and _KERNELS.fullmatch(name) else ""
        found.append(Difference("package", name, *said, matters))
    return found


def environment(
    before: Mapping[str, Any], now: Mapping[str, Any], *, on_gpu: bool = True
) -> list[Difference]:
    """The differences between two environments (`environment.json`): interpreter, machine, variables.

    Args:
        before: the first one.
        now: the second one.
        on_gpu: whether the run computed on a GPU, which decides what matters.
    """
    found = [*_facts("python", _PYTHON, before, now), *_facts("machine", _MACHINE, before, now)]
    found += _variables(before.get("variables", {}), now.get("variables", {}))
    return [_judged(difference, on_gpu) for difference in found]


def computing(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a run that affect how it computes, and mean the same in any place."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(_COMPUTING) and not name.startswith(_OF_A_LAUNCH)
        and "/" not in value and REDACTED not in value
    }  # fmt: skip


def _facts(
    kind: Kind, names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[Difference]:
    for name in names:
        was, is_ = before.get(name), now.get(name)
        if was != is_:
            yield Difference(kind, name, _in_words(name, was), _in_words(name, is_))


def _variables(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield Difference("variable", name, before.get(name), now.get(name))


def _judged(difference: Difference, on_gpu: bool) -> Difference:
    why = {
        "processor": "" if on_gpu else "the processor decides which kernels run",
        "cores": "" if on_gpu else "sums are split over as many threads as there are cores",
        "gpus": "the GPU decides which kernels run" if on_gpu else "",
        "cudnn": "its kernels may add in a different order" if on_gpu else "",
    }.get(difference.name, "")
    if difference.kind == "variable" and computing({difference.name: ""}):
        why = "it decides how kernels compute"
    return Difference(difference.kind, difference.name, difference.before, difference.now, why)


def _in_words(name: str, value: Any) -> str | None:
    if name == "memory_bytes" and value:
        return f"{value / 2**30:.0f} GiB"
    if isinstance(value, list):
        counts = {str(one): value.count(one) for one in value}
        return ", ".join(f"{count} x {one}" for one, count in counts.items()) or "none"
    return None if value is None else str(value)
