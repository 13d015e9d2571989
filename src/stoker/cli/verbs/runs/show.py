"""`stoker runs show RUN`: show one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stoker.cli.output import DEFAULT_RUNS, Json, RunsFolder, console, print_json
from stoker.cli.verbs.runs.common import RunName, entry, iso
from stoker.report import commands, facts, performance, terminal
from stoker.report.terminal import Listed, Pending
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView


def show(run: RunName, runs: RunsFolder = DEFAULT_RUNS, json: Json = False) -> None:
    """Show a run: status, attempts, metrics, config and artifacts. Each config value has its source."""
    seen = view.load(finding.find(runs, run))
    sinks = _sinks(seen.directory)
    if json:
        print_json(_everything(seen, sinks))
    else:
        terminal.print_run(console(), seen, sinks)


def _everything(seen: RunView, sinks: Sequence[Pending]) -> dict[str, Any]:
    return {
        **entry(Listed(seen.directory, seen)),
        "recipe": seen.record.get("recipe"),
        "command": "\n".join(commands.of(seen)),
        "seed": seen.record.get("seed"),
        "attempts": [
            {**{k: v for k, v in vars(a).items() if k != "spent"},
             "status": seen.status if a is seen.attempts[-1] else a.status,
             "started": iso(a.started), "ended": iso(a.ended), "last_event": iso(a.last_event)}
            for a in seen.attempts
        ],
        "config": {v.key: {"value": v.value, "source": v.source} for v in facts.config(seen)},
        "metrics": {name: summary.facts() for name, summary in facts.metrics(seen).items()},
        "performance": performance.as_json(seen),
        "left_out": [vars(batch) | {"time": iso(batch.time)} for batch in seen.left_out],
        "checkpoints": facts.kept_checkpoints(seen),
        "artifacts": [vars(a) for a in facts.artifacts(seen)],
        "code": seen.record.get("code"),
        "params": seen.params,
        "tags": seen.tags,
        "notes": [{"time": iso(time), "text": text} for time, text in seen.notes],
        "used": [vars(use) for use in seen.used.values()],
        "used_by": seen.used_by,
        "media": [vars(media) for media in seen.media if media.kind != "histogram"],
        "damage": [vars(damage) for damage in seen.damage],
        "sinks": [vars(sink) for sink in sinks],
        "next": terminal.next_commands(seen),
    }  # fmt: skip


def _sinks(run: RunDirectory) -> list[Pending]:
    from stoker.tracking import follower

    return [Pending(s.name, s.where, s.pending, s.error) for s in follower.state(run)]
