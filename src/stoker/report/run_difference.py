"""What differs between two runs: config, code, packages, data, machine, and results.

What is the same is named in one line. If a run has no record of something, the output says so: nothing
unknown is assumed to be equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from stoker import config as configs
from stoker import storage
from stoker.report import facts
from stoker.report.reproduction import exact, share, step
from stoker.report.terminal import plain, print_heading, print_section
from stoker.reproduce import code_changes, differences, inputs, journals, provenance
from stoker.reproduce.code_changes import Change, CodeChanges
from stoker.reproduce.differences import Difference
from stoker.reproduce.journals import Compared
from stoker.run.state import RunView
from stoker.words import counted, some

_NOTHING = "–"
_KINDS = {"packages": "package", "python": "python", "machine": "machine", "variables": "variable"}
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """Two runs and their differences."""

    names: tuple[str, str]
    views: tuple[RunView, RunView]
    config: Mapping[str, tuple[Any, Any]]
    same_config: int
    """The number of config keys with the same value in both runs."""
    code: CodeChanges
    environment: tuple[Difference, ...]
    """Differences of the environment, including packages."""
    data: Mapping[str, tuple[str | None, str | None]]
    same_data: int
    curves: Compared
    unknown: tuple[str, ...]
    """What cannot be compared, and why."""


def compare(before: RunView, now: RunView) -> RunDifference:
    """Compare two runs by their records and journals."""
    values = [{**view.config, **view.params} for view in (before, now)]
    config = configs.drift(*values)
    folders = before.directory.provenance, now.directory.provenance
    code = code_changes.compare(*folders)
    found, unknown = _environment(before, now)
    data = [_data(view) for view in (before, now)]
    pairs = {name: (data[0].get(name), data[1].get(name)) for name in sorted({*data[0], *data[1]})}
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return RunDifference(
        names=(before.directory.name, now.directory.name),
        views=(before, now),
        config=config,
        same_config=len({*values[0], *values[1]}) - len(config),
        code=code,
        environment=tuple(found),
        data=differ,
        same_data=len(pairs) - len(differ),
        curves=journals.compare(before.points, now.points),
        unknown=(
            *([f"code: {code.unknown}"] if code.unknown else []), *_edited(before), *_edited(now), *unknown,
        ),
    )  # fmt: skip


def as_json(found: RunDifference) -> dict[str, Any]:
    """The differences as a dictionary, with the differing lines of each code file."""
    return {
        "runs": list(found.names),
        "config": dict(found.config),
        "code": {
            "commits": [code.commit if code else None for code in (found.code.before, found.code.now)],
            "files": [asdict(change) for change in found.code.files],
        },
        "environment": [asdict(difference) for difference in found.environment],
        "data": dict(found.data),
        "curves": journals.as_json(found.curves),
        "metrics": {name: list(pair) for name, pair in _last(found).items()},
        "unknown": list(found.unknown),
    }


def print_difference(console: Console, found: RunDifference) -> None:
    """Print what differs, one section per kind, and what does not in one line."""
    if not console.is_terminal:
        console.width = 10_000
    console.print(Text.assemble(("a ", "dim"), (found.names[0], "bold")))
    console.print(Text.assemble(("b ", "dim"), (found.names[1], "bold")))
    print_section(
        console, "config", ("", "a", "b"), [(k, *map(_value, pair)) for k, pair in found.config.items()]
    )
    _print_code(console, found.code)
    for title, kind in _KINDS.items():
        rows = [
            (d.name, d.before or _NOTHING, d.now or _NOTHING) for d in found.environment if d.kind == kind
        ]
        print_section(console, title, ("", "a", "b"), rows)
    print_section(
        console,
        "data",
        ("", "a", "b"),
        [(k, a or _NOTHING, b or _NOTHING) for k, (a, b) in found.data.items()],
    )
    headings = ("", "last of a", "last of b", "differs from step", "drifts by", "relative", "at step")
    print_section(console, "curves", headings, _curves(found))
    console.print()
    for said in found.unknown:
        console.print(Text(f"not known: {plain(said)}", "yellow"), soft_wrap=True)
    if same := _same(found):
        console.print(Text(f"the same: {same}", "dim"), soft_wrap=True)


def _edited(view: RunView) -> list[str]:
    """A note on a run that resumed with different code than recorded."""
    attempt = next((attempt for attempt in view.attempts if attempt.code), None)
    if attempt is None:
        return []
    files = some(list(attempt.code))
    said = f"resumed with different code in attempt {attempt.number}: {files} changed"
    return [f"code: {view.directory.id} {said}"]


def _environment(before: RunView, now: RunView) -> tuple[list[Difference], list[str]]:
    """Differences in packages, interpreter, machine and variables, and which run has no record of them."""
    locks = [_text(view, provenance.REQUIREMENTS) for view in (before, now)]
    records = [
        storage.read_json(view.directory.provenance / provenance.ENVIRONMENT) for view in (before, now)
    ]
    unknown = [
        f"{what}: {view.directory.id} has no record of it"
        for what, known in (("packages", locks), ("machine", records))
        for view, there in zip((before, now), known, strict=True)
        if not there
    ]
    found = differences.packages(*locks) if all(locks) else []
    return [*found, *(differences.environment(*records) if all(records) else [])], unknown


def _data(view: RunView) -> dict[str, str]:
    return inputs.fingerprints(storage.read_json(view.directory.provenance / provenance.DATA), view.tags)


def _print_code(console: Console, code: CodeChanges) -> None:
    commits = tuple((c.commit or "")[:12] if c else "" for c in (code.before, code.now))
    if commits[0] != commits[1]:
        print_section(console, "code", ("", "a", "b"), [("commit", *(c or _NOTHING for c in commits))])
    elif code.files:
        print_heading(console, "code")
    for change in code.files:
        console.print(Text(f"  {plain(_described(change))}", "bold"), soft_wrap=True)
        for line in change.lines:
            console.print(Text(f"  {plain(line)}".rstrip(), _STYLES.get(line[:1], "")), soft_wrap=True)


def _described(change: Change) -> str:
    counts = f", +{change.added} -{change.removed}" if change.lines else ""
    if change.how == "renamed":
        return f"{change.was} renamed to {change.path}"
    binary = ", not text" if change.how in ("changed", "added", "removed") and not change.lines else ""
    return f"{change.path} {change.how}{counts}{binary}"


def _curves(found: RunDifference) -> list[tuple[str, ...]]:
    last = _last(found)
    return [
        (
            drift.metric, *(exact(value) for value in last[drift.metric]), f"{drift.first_step:,}",
            facts.number(drift.absolute), share(drift.relative),
            step(drift.absolute_step),
        )
        for drift in found.curves.drifts
    ]  # fmt: skip


def _last(found: RunDifference) -> dict[str, tuple[float | None, float | None]]:
    one, other = found.views
    return {name: (one.last(name), other.last(name)) for name in found.curves.metrics}


def _same(found: RunDifference) -> str:
    """What is the same, in words."""
    said = []
    if not found.config:
        said.append(f"config ({counted(found.same_config, 'key')})")
    known = {said.partition(":")[0] for said in found.unknown}
    if found.code.before and found.code.now and not found.code.files and "code" not in known:
        said.append(f"code ({counted(len(found.code.now.files), 'file')})")
    differ = {difference.kind for difference in found.environment}
    said += [
        title
        for title, kind in _KINDS.items()
        if kind not in differ and ("packages" if kind == "package" else "machine") not in known
    ]  # fmt: skip
    if found.same_data and not found.data:
        said.append("data")
    equal = [name for name in found.curves.metrics if name not in {d.metric for d in found.curves.drifts}]
    if equal:
        said.append(f"bit-identical {', '.join(equal)}{found.curves.extent}")
    return ", ".join(said)


def _value(value: Any) -> str:
    return _NOTHING if value is None else facts.text(value)


def _text(view: RunView, name: str) -> str:
    try:
        return (view.directory.provenance / name).read_text(encoding="utf-8")
    except OSError:
        return ""
