"""The settings of `--option` on Kubernetes, and what their values may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from stoker import duration, words
from stoker.errors import BadInput, nearest

SELECTOR = "node."
"""Prefix for a label that nodes must have, as in `node.accelerator=a100`."""
_KNOWN = {
    "image": "the container image with the code",
    "kind": "job, pytorchjob or trainjob",
    "claim": "the persistent volume claim that holds the runs",
    "namespace": "the namespace of the job",
    "secret": "the Secret with the variables of --env NAME",
    "secret-files": "NAME:/FOLDER, the Secret that pods have as files in that folder",
    "service-account": "the service account of the pods",
    "pull-secret": "the Secret for pulling the image",
    "priority-class": "the PriorityClass of the pods",
    "queue": "Kueue's queue",
    "gpu-resource": "nvidia.com/gpu by default",
    "ephemeral-storage": "the local disk of a pod, such as 50GB",
    "grace": "the time that a pod has for a checkpoint, 2min by default",
    "user": "the id of the user that pods run as, without any privileges",
    "fs-group": "the id of the group that owns the volumes",
    "toleration": "taints that the pods tolerate, as KEY or KEY=VALUE, separated by commas",
    "runtime": "the ClusterTrainingRuntime of a trainjob, torch-distributed by default",
}
RUNS, SHARED_MEMORY = "/runs", "/dev/shm"
"""Where pods have the volume for the runs, and the one for shared memory."""
_GRACE = 120  # seconds

_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_IMAGE = re.compile(r"[\w./:@+-]*")
_ID = re.compile(r"[1-9][0-9]{0,8}")
_FILES = re.compile(r"(?P<secret>[^:]+):(?P<folder>/[^:]*[^:/])")


def check(options: Mapping[str, str]) -> None:
    """Raises BadInput for a setting that is not known, or whose value the cluster would refuse."""
    for key, value in options.items():
        if key.startswith(SELECTOR):
            _check_selector(key, value)
        elif key not in _KNOWN:
            known = "; ".join(f"{name}: {what}" for name, what in _KNOWN.items())
            raise BadInput(
                f"--option {key}: no such setting{nearest(key, _KNOWN)}; the settings are {known}; "
                "node.LABEL: a label that nodes must have"
            )
        elif key in _RULES:
            allows, said = _RULES[key]
            if not allows(value):
                raise BadInput(f"--option {key}={value}: {said}")
    grace(options)


def grace(options: Mapping[str, str]) -> int:
    """The seconds that a pod has for a checkpoint after being told to stop. Raises BadInput."""
    given = options.get("grace")
    return _GRACE if given is None else round(duration.limit("--option grace:", given))


def files(options: Mapping[str, str]) -> tuple[str, str]:
    """The Secret of `secret-files`, and the folder where its keys are files; empty if there is none."""
    match = _FILES.fullmatch(options.get("secret-files", ""))
    return (match["secret"], match["folder"]) if match else ("", "")


def _check_selector(key: str, value: str) -> None:
    """Raises BadInput."""
    label = key.removeprefix(SELECTOR)
    if not label:
        raise BadInput(f"--option {key}={value}: give node.LABEL=VALUE, such as node.accelerator=a100")
    if not _is_key(label) or not _is_label_value(value):
        raise BadInput(
            f"--option {key}={value}: a label, and its value, have at most 63 letters, digits, -, _ and ., "
            "and begin and end with a letter or digit"
        )


def _is_name(value: str) -> bool:
    return len(value) <= 253 and all(map(_DNS_LABEL.fullmatch, value.split(".")))


def _is_label_value(value: str) -> bool:
    return not value or _LABEL_VALUE.fullmatch(value) is not None


def _is_key(value: str) -> bool:
    """Whether this is the key of a label or taint, or the name of a resource: `nvidia.com/gpu`, `pool`."""
    domain, slash, name = value.rpartition("/")
    return _LABEL_VALUE.fullmatch(name) is not None and (_is_name(domain) if slash else True)


def _are_taints(value: str) -> bool:
    pairs = [taint.partition("=") for taint in value.split(",")]
    return all(_is_key(key) and _is_label_value(value) for key, _, value in pairs)


def _are_files(value: str) -> bool:
    match = _FILES.fullmatch(value)
    return match is not None and _is_name(match["secret"]) and match["folder"] not in (RUNS, SHARED_MEMORY)


_NAMED = (_is_name, "a Kubernetes name has only lower-case letters, digits, - and . (RFC 1123)")
_NUMBERED = (lambda value: _ID.fullmatch(value) is not None, "give an id, a number above 0, such as 1000")
_RULES: Mapping[str, tuple[Callable[[str], bool], str]] = {
    **dict.fromkeys(
        ("claim", "secret", "service-account", "pull-secret", "priority-class", "runtime"), _NAMED
    ),
    **dict.fromkeys(("user", "fs-group"), _NUMBERED),
    "image": (lambda value: _IMAGE.fullmatch(value) is not None, "not a valid image name"),
    "namespace": (
        lambda value: _DNS_LABEL.fullmatch(value) is not None,
        "the name of a namespace has at most 63 lower-case letters, digits and - (RFC 1123)",
    ),
    "queue": (
        lambda value: _is_name(value) and len(value) <= 63,
        "a label has the name of the queue: at most 63 lower-case letters, digits, - and .",
    ),
    "gpu-resource": (
        lambda value: "/" in value and _is_key(value),
        "give the name of a resource and its domain, such as nvidia.com/gpu",
    ),
    "ephemeral-storage": (lambda value: words.parsed_size(value) >= 2**20, "give a size, such as 50GB"),
    "secret-files": (
        _are_files,
        "give NAME:/FOLDER, the Secret and a folder of its own for its files, as in keys:/keys",
    ),
    "toleration": (_are_taints, "give KEY or KEY=VALUE of a taint, as in pool=a"),
}
