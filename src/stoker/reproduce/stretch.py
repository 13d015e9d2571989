"""The steps of a run that a single training can repeat: with one config, on one number of ranks.

A run that was continued on a different number of ranks or another kind of device, or with a changed config or
code, differs from what one training gives: the repetition ends where that changed, or starts after it, from a
checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stoker import words
from stoker.errors import BadInput
from stoker.run.state import AttemptView, RunView
from stoker.status import FINISHED


@dataclass(frozen=True)
class Stretch:
    """Steps of a run, and their settings."""

    after: int
    """The step of the checkpoint that it starts from; 0 for the beginning."""
    until: int | None
    """The last step; None if training ends by itself."""
    config: Mapping[str, Any]
    world: int
    """The number of ranks."""
    layout: Mapping[str, Any]
    """How they used the devices, if a Trainer did."""
    why: str = ""
    """Why it ends before the run does."""
    by_itself: bool = False
    """Whether a training with this config ends at `until` by itself, with all it does at its end."""

    @property
    def stop_at(self) -> int | None:
        """The step at which to stop the training; None if it ends by itself."""
        return None if self.by_itself else self.until


@dataclass(frozen=True)
class Part:
    """Steps of a run that were made with one config and code, on one number of ranks."""

    after: int
    """The step after which it begins."""
    config: Mapping[str, Any]
    world: int
    drift: frozenset[str]
    """The keys of the config that differ from the run's record."""
    code: Mapping[str, str | None]
    """The code files that differ from those at the run's start."""
    device: str
    """The kind of device; empty if none was recorded."""
    machines: int = field(default=1, compare=False)
    """On which the ranks were at first; as many ranks on others make the same steps."""


def parts(view: RunView, until: int) -> list[Part]:
    """The parts of a run that made its first steps, in their order; a run without steps has one."""
    found: list[Part] = []
    for start, attempt in _parts(view):
        made = Part(
            start, _config(view, attempt), attempt.world, frozenset(attempt.drift), attempt.code,
            _device(view, attempt), attempt.machines,
        )  # fmt: skip
        if not found or (start < until and made != replace(found[-1], after=start)):
            found.append(made)
    return found


def find(view: RunView, after: int | None = None, steps: int | None = None) -> Stretch:
    """The longest stretch that one training can repeat.

    Args:
        view: the run.
        after: the step of one of its checkpoints to start from; default: its beginning.
        steps: the maximum number of steps.

    Raises:
        BadInput: there is nothing to repeat.
    """
    if not view.points:
        raise BadInput(f"{view.directory.id} has logged nothing, so there is nothing to compare with")
    parts = _parts(view)
    begin = parts[0][0] if after is None else after
    without_steps = view.step == begin == 0 and view.status == FINISHED  # such as an evaluation
    if view.step <= begin and not without_steps:
        raise BadInput(f"{view.directory.id} has no step after step {begin}: it ended at step {view.step}")
    index = max(i for i, (start, _) in enumerate(parts) if start <= begin or i == 0)
    first = parts[index][1]
    until, why, by_itself = None if view.status == FINISHED else view.step, "", view.status == FINISHED
    for (_, before), (start, attempt) in itertools.pairwise(parts[index:]):
        why = _changed(view, first, attempt)
        if why:
            until, by_itself = start, before.status == FINISHED and before.step in (None, start)
            break
    if steps is not None and begin + steps < (until or view.step):
        until, why, by_itself = begin + steps, "", False
    return Stretch(begin, until, _config(view, first), first.world, first.layout, why, by_itself)


def _parts(view: RunView) -> list[tuple[int, AttemptView]]:
    """The attempts whose steps are valid, each with the step after which it began."""
    parts: list[tuple[int, AttemptView]] = []
    for attempt in view.attempts:
        start = _began_after(view, attempt) if parts else attempt.resumed_from or 0
        parts = [part for part in parts if part[0] < start]
        parts.append((start, attempt))
    return parts


def _began_after(view: RunView, attempt: AttemptView) -> int:
    """A Trainer records where it resumed; a user's own loop continues after its last point."""
    if attempt.resumed_from is not None or attempt.began is not None:
        return attempt.resumed_from or 0
    before = (series.x[series.time < attempt.started] for series in view.points.values())
    return max((int(steps.max()) for steps in before if len(steps)), default=0)


def _config(view: RunView, attempt: AttemptView) -> dict[str, Any]:
    return {**view.record["config"], **{key: new for key, (_, new) in attempt.drift.items()}}


def _device(view: RunView, attempt: AttemptView) -> str:
    """The kind of device of an attempt; of one that did not record it, that of the nearest that did."""
    known = [(one.number, str(one.layout["device"])) for one in view.attempts if "device" in one.layout]
    before = [device for number, device in known if number <= attempt.number]
    return before[-1] if before else next((device for _, device in known), "")


def _changed(view: RunView, before: AttemptView, now: AttemptView) -> str:
    """What changed between two attempts, as text; empty if nothing did."""
    if before.world != now.world:
        return f"it resumed with {now.world} ranks instead of {before.world}"
    if _device(view, before) != _device(view, now):
        return f"it resumed on {_device(view, now)} instead of {_device(view, before)}"
    one, other = _config(view, before), _config(view, now)
    changes = [f"{key} from {one.get(key)} to {other[key]}" for key in other if one.get(key) != other[key]]
    if changes:
        return f"it resumed with a different config: {', '.join(changes)}"
    other_files = [
        path for path in {**before.code, **now.code} if before.code.get(path) != now.code.get(path)
    ]
    return f"it resumed with different code: {words.some(other_files)}" if other_files else ""
