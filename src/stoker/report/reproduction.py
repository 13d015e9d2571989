"""A reproduction of a run, on a terminal: what was checked beforehand, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from stoker.report import facts
from stoker.report.terminal import plain, print_whole, table
from stoker.reproduce import journals
from stoker.reproduce.code import Code
from stoker.reproduce.differences import Difference
from stoker.reproduce.inputs import Input
from stoker.reproduce.journals import Compared, Drift
from stoker.reproduce.stretch import Stretch
from stoker.run.series import measures_machine
from stoker.words import counted, some

_MOST = 8  # named differences per kind
_KINDS = {"python": "python", "package": "packages", "machine": "machine", "variable": "variables"}


@dataclass(frozen=True)
class Checked:
    """What is known before a run is reproduced."""

    of: str
    name: str
    part: Stretch
    code: Code
    changed_since: tuple[str, ...]
    """Code files that have changed since at the place they were recorded from."""
    lacking: tuple[str, ...]
    """Files that the record left out and that are missing or changed now."""
    data: tuple[Input, ...]
    linked: tuple[str, ...]
    """Other paths of the config that were linked into the code."""
    not_linked: tuple[str, ...]
    """Files at such paths that changed after the run began."""
    packages: int
    """The number of packages in the run's lock file."""
    variables: Mapping[str, str]
    """Environment variables that are set as recorded."""
    differences: tuple[Difference, ...]
    doubts: tuple[str, ...]
    """Other reasons why bit-identity cannot be promised."""
    environment: str
    """The interpreter of the environment that was built; empty if it is the current one."""


@dataclass(frozen=True)
class Weights:
    """Checksums of weights that both runs have."""

    same: tuple[str, ...]
    other: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The result of a reproduction."""

    checked: Checked
    path: str
    """The directory of the new run."""
    compared: Compared
    weights: Weights
    config: Mapping[str, tuple[Any, Any]]
    """Keys that were overridden: recorded value, given value."""
    fingerprints: Mapping[str, tuple[str | None, str | None]]
    """Differing dependencies of the two runs: data, models."""
    failures: tuple[str, str] | None = None
    """How each run ended, if both failed after everything that is compared."""

    @property
    def identical(self) -> bool:
        return self.compared.identical and not self.weights.other


def print_checked(console: Console, checked: Checked) -> None:
    """Print the findings before anything is trained."""
    console.print(Text.assemble((checked.of, "bold"), " again, as ", (checked.name, "bold")))
    _pair(console, "code", _code(checked))
    for one in checked.data:
        name = "" if one.name == "data" else f"{one.name}: "
        _pair(console, "data", f"{name}{one.said}", "yellow" if one.changed else "")
    _pair(console, "linked", some(checked.linked))
    if checked.not_linked:
        why = "changed after the run began, so it may be what the run wrote"
        _pair(console, "not linked", f"{some(checked.not_linked)}: {why}")
    _pair(console, "python", checked.environment)
    of_kind = {label: [d for d in checked.differences if d.kind == kind] for kind, label in _KINDS.items()}
    _pair(console, "packages", "" if of_kind["packages"] else f"{checked.packages} as recorded")
    _pair(console, "machine", "" if of_kind["machine"] else "as recorded")
    set_ = ", ".join(f"{name}={value}" for name, value in checked.variables.items())
    _pair(console, "variables", f"{set_} set as recorded" if set_ else "")
    for label, found in of_kind.items():
        _print_differences(console, label, found)
    _pair(console, "steps", _steps(checked.part))
    for doubt in doubts(checked):
        _pair(console, "no promise", doubt, "yellow")
    console.print()


def print_outcome(console: Console, outcome: Outcome, options: str = "") -> None:
    """Print whether the result is the same, or else where and by how much it diverges.

    Args:
        options: options with which the suggested next command finds the runs, with a leading space.
    """
    compared, weights = outcome.compared, outcome.weights
    console.print()
    console.print(_verdict(outcome))
    if compared.drifts:
        print_whole(console, _drifts(compared.drifts))
    elif compared.metrics:
        _pair(console, "compared", some(compared.metrics))
    _pair(console, "weights", f"bit-identical: {some(weights.same)}" if weights.same else "")
    _pair(console, "weights", f"different: {some(weights.other)}" if weights.other else "", "red")
    of_machine = [name for name in compared.left_out if measures_machine(name)]
    asked = [name for name in compared.left_out if name not in of_machine]
    _pair(console, "left out", f"{some(of_machine)}: depends on the machine" if of_machine else "")
    _pair(console, "left out", f"{some(asked)}: excluded with --ignore" if asked else "")
    at_end = f"{some(compared.of_one_end)} of the last step: only one of the runs went on to it"
    _pair(console, "left out", at_end if compared.of_one_end else "")
    if outcome.failures is not None:
        then, again = outcome.failures
        said = f"as before: {again}" if then == again else f"with {again}; before with {then}"
        _pair(console, "failed", said, "yellow")
    for key, (was, is_) in outcome.config.items():
        _pair(console, "config", f"{key}: {facts.text(was)} → {facts.text(is_)}", "yellow")
    for name, (before, now) in outcome.fingerprints.items():
        _pair(console, "content", f"{name}: {before or 'none'} → {now or 'none'}", "yellow")
    if not outcome.identical:
        for why in causes(outcome):
            _pair(console, "also differs", why, "yellow")
    _pair(console, "run", outcome.path)
    following = f"next: stoker diff {outcome.checked.of} {outcome.checked.name}{options}"
    console.print(Text(following, "dim"), soft_wrap=True)


def doubts(checked: Checked) -> list[str]:
    """The reasons why bit-identity cannot be promised, one line each."""
    by_reason: dict[str, list[str]] = {}
    for difference in checked.differences:
        if difference.matters:
            by_reason.setdefault(difference.matters, []).append(difference.name)
    return [*(f"{some(names)} differs: {reason}" for reason, names in by_reason.items()), *checked.doubts]


def causes(outcome: Outcome) -> list[str]:
    """Other differences between the two runs, which may be the cause."""
    found = [
        f"{d.name}: {d.before or 'none'} → {d.now or 'none'}"
        for d in _ranked(outcome.checked.differences)[:_MOST]
    ]
    found += outcome.checked.doubts
    if found or outcome.config or outcome.fingerprints:
        return found
    return [
        "no recorded difference: does it read the clock, the network, or files that its config does not name?"
    ]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The result as a dictionary."""
    checked = outcome.checked
    return {
        "identical": outcome.identical, "run": checked.of, "again": checked.name, "path": outcome.path,
        **{key: value for key, value in journals.as_json(outcome.compared).items() if key != "identical"},
        "weights": asdict(outcome.weights), "config": dict(outcome.config),
        "failures": outcome.failures, "fingerprints": dict(outcome.fingerprints), "doubts": doubts(checked),
        "differences": [asdict(difference) for difference in checked.differences],
        "code": {"commit": checked.code.commit, "files": len(checked.code.files),
                 "changed_since": list(checked.changed_since), "lacking": list(checked.lacking)},
        "data": [{**asdict(one), "changed": one.changed} for one in checked.data],
        "linked": list(checked.linked), "not_linked": list(checked.not_linked),
        "variables": dict(checked.variables), "after": checked.part.after,
        "until": checked.part.until, "environment": checked.environment,
    }  # fmt: skip


def drift_rows(drifts: Iterable[Drift]) -> list[tuple[str, ...]]:
    """Table rows for metrics that differ: the first step, both values, and the largest distance."""
    return [
        (
            drift.metric, f"{drift.first_step:,}", exact(drift.before), exact(drift.now),
            facts.number(drift.absolute), share(drift.relative),
            step(drift.absolute_step), _points(drift),
        )
        for drift in drifts
    ]  # fmt: skip


def exact(value: float | None) -> str:
    """A value, written so that no other value looks the same."""
    return "–" if value is None else repr(value)


def step(number: int | None) -> str:
    """A step, or empty if there is none."""
    return "" if number is None else f"{number:,}"


def share(relative: float) -> str:
    """A relative difference: `2.31%`, `1.2e-07`."""
    return f"{relative:.2%}" if relative >= 1e-4 else f"{relative:.1e}"


def _points(drift: Drift) -> str:
    alone = drift.lacking + drift.added
    return f"{drift.differing + alone:,} of {drift.points + alone:,}"


DRIFT_HEADINGS = ("", "first at", "was", "is", "drifts by", "relative", "at step", "points")


def _verdict(outcome: Outcome) -> Text:
    compared = outcome.compared
    if outcome.identical:
        return Text(f"bit-identical{compared.extent}", "bold green")
    if not compared.metrics:
        return Text("nothing to compare: no computed metric was logged at these steps", "bold yellow")
    if not compared.drifts:
        return Text(f"the metrics are bit-identical{compared.extent}, the weights are not", "bold red")
    first = compared.drifts[0]
    return Text(f"differs from step {first.first_step:,} on, first in {plain(first.metric)}", "bold red")


def _drifts(drifts: Sequence[Drift]) -> Table:
    made = table(DRIFT_HEADINGS, right=DRIFT_HEADINGS[1:], dim=True)
    for row in drift_rows(drifts):
        made.add_row(*(Text(plain(cell)) for cell in (f"  {row[0]}", *row[1:])))
    return made


def _code(checked: Checked) -> str:
    code = checked.code
    if not code.files:
        return "no code was recorded: the installed code runs"
    commit = (
        f"commit {code.commit[:12]}{', with uncommitted changes' if code.dirty else ''}, "
        if code.commit
        else ""
    )
    said = f"{commit}{counted(len(code.files), 'file')} as recorded"
    if checked.changed_since:
        said += f"; changed since at their origin: {some(checked.changed_since)}"
    if checked.lacking:
        said += f"; not recorded, and missing or changed now: {some(checked.lacking)}"
    return said


def _steps(part: Stretch) -> str:
    if not part.after and part.until is None:
        return "all"
    begin = f", from the checkpoint of step {part.after:,}" if part.after else ""
    why = f"; after that {part.why}" if part.why else ""
    return f"{part.after + 1:,} to {'the end' if part.until is None else f'{part.until:,}'}{begin}{why}"


def _print_differences(console: Console, label: str, found: Sequence[Difference]) -> None:
    for difference in _ranked(found)[:_MOST]:
        said = f"{difference.name}: {difference.before or 'none'} → {difference.now or 'none'}"
        _pair(console, label, said, "yellow" if difference.matters else "")
    if len(found) > _MOST:
        _pair(console, label, f"and {len(found) - _MOST} more; `stoker diff` lists them")


def _ranked(found: Iterable[Difference]) -> list[Difference]:
    return sorted(found, key=lambda difference: not difference.matters)


def _pair(console: Console, label: str, said: str, style: str = "") -> None:
    if said:
        console.print(Text.assemble((f"  {label:12} ", "dim"), (plain(said), style)), soft_wrap=True)
