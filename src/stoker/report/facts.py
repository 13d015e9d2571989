"""The facts of a run that the terminal and the HTML report both show.

Everything is computed from the view of the run and the files in its directory. Missing parts are
left out, so a run of any age or condition has facts.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.checkpoint import manifest
from stoker.config import DEFAULT
from stoker.reproduce import provenance as records
from stoker.run.directory import RunDirectory
from stoker.run.media import read_table
from stoker.run.series import Summary
from stoker.run.state import AttemptView, Media, RunView
from stoker.words import counted, some

_FOUND_OUT = "determined by the run"
_TEXT_LIMIT = 400_000  # characters of a diff that are shown; the run's directory has all of it


@dataclass(frozen=True)
class Value:
    """A config value and where it came from."""

    key: str
    value: Any
    source: str
    is_default: bool


@dataclass(frozen=True)
class Artifact:
    """An artifact of the run: a file or a folder, with its size in bytes."""

    name: str
    kind: str
    path: str
    files: int
    bytes: int
    sums: dict[str, str]
    """The SHA-256 of every file, by path."""


@dataclass(frozen=True)
class Provenance:
    """What the run was made from, as far as it was recorded."""

    code: dict[str, Any]
    diff: str
    packages: str
    """A lock file that pip accepts."""
    environment: dict[str, Any]
    data: dict[str, Any]


def metrics(view: RunView) -> dict[str, Summary]:
    """The summary of every metric: `loss` and `val_loss` first, then by name."""
    found = view.summary()
    return {name: found[name] for name in sorted(found, key=lambda n: (n != "loss", n != "val_loss", n))}


def logged(view: RunView, kind: str, suffix: str = "") -> dict[str, list[Media]]:
    """Logged media of one kind whose file ends with `suffix`, by name, each in the order of steps."""
    found: dict[str, list[Media]] = {}
    for media in view.media:
        known = media.kind == kind and isinstance(media.name, str) and type(media.step) is int
        if known and (not suffix or str((media.file or {}).get("path", "")).endswith(suffix)):
            found.setdefault(media.name, []).append(media)
    return {name: sorted(of, key=lambda m: m.step) for name, of in sorted(found.items())}


def content_file(view: RunView, media: Media) -> Path | None:
    """The file of a logged medium; None if it is missing or its path leads outside the run."""
    root = view.directory.path.resolve()
    file = (root / str((media.file or {}).get("path", ""))).resolve()
    return file if file.is_relative_to(root) and file.is_file() else None


def tables(view: RunView) -> dict[str, list[Media]]:
    """The logged tables by name, each in the order of steps."""
    return logged(view, "table")


def table_rows(view: RunView, table: Media) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a logged table; no rows if its file is missing or not a table."""
    file = content_file(view, table)
    if file is not None:
        with contextlib.suppress(OSError, ValueError):
            return read_table(file.read_bytes())
    return [str(name) for name in table.about.get("columns", [])], []


def config(view: RunView) -> list[Value]:
    """Every config value with its source, values that are not defaults first.

    A value that the run determined after its start replaces the one given in the config.
    """
    sources = dict(view.record.get("sources", {}))
    for key, change in view.drift.items():
        since = next(a.number for a in view.attempts if a.drift.get(key) == change)
        sources[key] = f"changed at attempt {since}"
    sources |= dict.fromkeys(view.config.keys() & view.params.keys(), _FOUND_OUT)
    found = [
        Value(key, view.params.get(key, value), sources.get(key, ""), sources.get(key, DEFAULT) == DEFAULT)
        for key, value in view.config.items()
    ]
    return sorted(found, key=lambda v: v.is_default)


def artifacts(view: RunView) -> list[Artifact]:
    """The artifacts of the run, except its reports, which can be regenerated at any time."""
    return [
        Artifact(
            name=name,
            kind=event.get("kind", "file"),
            path=_common_folder([f["path"] for f in event["files"]]),
            files=len(event["files"]),
            bytes=sum(f["size"] for f in event["files"]),
            sums={f["path"]: f.get("sha256", "") for f in event["files"]},
        )
        for name, event in view.artifacts.items()
        if event.get("kind") != "report"
    ]


def attempt_notes(view: RunView, attempt: AttemptView) -> list[str]:
    """Notes on an attempt: its error, skipped checkpoints, changed config and code."""
    last = next((a for a in reversed(view.attempts) if a.number < attempt.number), None)
    before, code = (last.drift, last.code) if last is not None else ({}, {})
    changes = [
        f"{key}: {text(change[0])} → {text(change[1])}"
        for key, change in attempt.drift.items()
        if before.get(key) != change
    ]
    passed_over = [f"skipped {checkpoint}" for checkpoint in attempt.passed_over]
    if attempt.code != code:
        now = f"{some(list(attempt.code))} changed" if attempt.code else "back to that of the run's start"
        changes.append(f"code: {now}")
    return [*([attempt.error] if attempt.error else []), *passed_over, *changes]


def where(attempt: AttemptView) -> str:
    """The host of an attempt's first rank, and how many ranks and machines there were, if more than one."""
    several = together(attempt.world, attempt.machines) if attempt.world > 1 else ""
    return ", ".join(part for part in (attempt.host, several) if part)


def together(world: int, machines: int) -> str:
    """A number of ranks: `4 ranks`, `4 ranks on 2 machines`."""
    on = f" on {counted(machines, 'machine')}" if machines > 1 else ""
    return f"{counted(world, 'rank')}{on}"


def left_out(view: RunView) -> str:
    """The batches that were left out because of their loss: `2 batches, at step 18, 28`."""
    found = view.left_out
    if not found:
        return ""
    count = f"{len(found):,} {'batch' if len(found) == 1 else 'batches'}"
    back = some(list(dict.fromkeys(f"{b.rewound_to:,}" for b in found if b.rewound_to is not None)))
    rewound = f"; the weights went back to those of step {back}" if back else ""
    return f"{count}, at step {some([f'{batch.step:,}' for batch in found])}{rewound}"


def kept_checkpoints(view: RunView) -> list[int]:
    """The steps whose checkpoint still exists."""
    folder = view.directory.checkpoints
    there = (s for s in dict.fromkeys(view.checkpoints) if manifest.folder(folder, s).is_dir())
    return [step for step in there if (manifest.folder(folder, step) / manifest.NAME).is_file()]


def layout(view: RunView) -> str:
    """How the newest attempt used the devices: `ddp, bf16, 2 x NVIDIA H200`; empty without a Trainer."""
    found = view.attempts[-1].layout if view.attempts else {}
    if not {"parallel", "precision", "ranks", "device"} <= found.keys():
        return ""
    return f"{found['parallel']}, {found['precision']}, {found['ranks']} x {found['device']}"


def code(view: RunView) -> str:
    """The commit the run was made from: `3f9a1c2 on main, with uncommitted changes`."""
    state = view.record.get("code") or {}
    if not state.get("commit"):
        return "not in a git repository"
    branch = f" on {state['branch']}" if state.get("branch") else ""
    return f"{state['commit'][:12]}{branch}, {'with uncommitted changes' if state.get('dirty') else 'clean'}"


def provenance(directory: RunDirectory) -> Provenance:
    """The contents of the run's provenance folder. Missing or unreadable parts are empty."""
    folder = directory.provenance
    return Provenance(
        code=storage.read_json(folder / records.CODE),
        diff=_read_text(folder / records.DIFF),
        packages=_read_text(folder / records.REQUIREMENTS),
        environment=storage.read_json(folder / records.ENVIRONMENT),
        data=storage.read_json(folder / records.DATA),
    )


def number(value: float | None) -> str:
    """A number with five significant digits: `2.3457`, `3e-06`, `12,346`; empty for None."""
    if value is None:
        return ""
    if math.isfinite(value) and (abs(value) >= 10_000 or value == int(value)) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def text(value: Any) -> str:
    """A JSON value as it is written on the command line: texts bare, the rest as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _common_folder(paths: list[str]) -> str:
    """The path of a single file, or the folder that contains all of an artifact's files."""
    if len(paths) == 1:
        return paths[0]
    parents = [Path(path).parts[:-1] for path in paths]
    shared = [parts[0] for parts in zip(*parents, strict=False) if len(set(parts)) == 1]
    return "/".join(shared)


def _read_text(file: Path) -> str:
    try:
        found = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    if len(found) > _TEXT_LIMIT:
        return f"{found[:_TEXT_LIMIT]}\n... and {len(found) - _TEXT_LIMIT:,} more characters in {file.name}"
    return found
