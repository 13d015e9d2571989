"""The learning curves of a search: where its trials were compared, and what they were forked from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from plotly.graph_objects import Figure

_COLOURS = {"COMPLETE": "#2a6fbb", "PRUNED": "#a9b4c0", "FAIL": "#c0392b"}
_OTHER = "#e0a030"  # a trial that is running or waiting
_BEST = "#1b8a4b"
_RUNG = "#8b97a5"
_ALIKE = 0.01  # relative difference allowed in units per step between trials that share rungs


def figure(trials: Sequence[FrozenTrial], rungs: Sequence[float], best: int | None, metric: str) -> Figure:
    """Every trial's values by step; values inherited from a donor are dotted, rungs are dashed.

    Args:
        trials: with their values by step, see `points_of`.
        rungs: the amounts of the unit at which trials are compared.
        best: the number of the best trial.
        metric: the name of the values.
    """
    import plotly.graph_objects as go

    drawn = go.Figure()
    by_number = {trial.number: trial for trial in trials}
    for trial in trials:
        own, before = points_of(trial), inherited(trial, by_number)
        if not own:
            continue
        chosen = trial.number == best
        colour = _BEST if chosen else _COLOURS.get(trial.state.name, _OTHER)
        line = {"color": colour, "width": 3 if chosen else 1}
        about: dict[str, Any] = {"mode": "lines+markers" if len(own) == 1 else "lines", "showlegend": False}
        name = f"trial {trial.number}"
        if before:
            last, value = next(iter(own.items()))
            joined = {**before, last: value}
            drawn.add_scatter(
                x=[*joined], y=[*joined.values()], name=name, line={**line, "dash": "dot"}, **about
            )
        drawn.add_scatter(x=[*own], y=[*own.values()], name=name, line=line, **about)
    for step in _steps_of(rungs, trials):
        drawn.add_vline(x=step, line={"color": _RUNG, "width": 1.5, "dash": "dash"}, layer="below")
    drawn.update_layout(xaxis_title="step", yaxis_title=metric)
    return drawn


def points_of(trial: FrozenTrial) -> dict[float, float]:
    """The trial's own values by step of the metric that early stopping uses."""
    return dict(_numbered(trial.user_attrs.get("values") or trial.intermediate_values.items()))


def inherited(trial: FrozenTrial, others: Mapping[int, FrozenTrial]) -> dict[float, float]:
    """The inherited values of a trial by step: its donor's up to the fork, and so on back."""
    found: dict[float, float] = {}
    until = math.inf
    while (fork := trial.user_attrs.get("fork")) is not None and fork["donor"] in others:
        trial, until = others[fork["donor"]], min(until, fork["step"])
        found = {**{step: value for step, value in points_of(trial).items() if step <= until}, **found}
    return dict(sorted(found.items()))


def _numbered(pairs: Any) -> Iterator[tuple[float, float]]:
    return ((float(step), float(value)) for step, value in pairs)


def _steps_of(rungs: Sequence[float], trials: Sequence[FrozenTrial]) -> list[float]:
    """The steps of the rungs; none if a step is not the same amount for all trials."""
    of_a_step = [
        done / max(points_of(trial))
        for trial in trials
        if points_of(trial) and "fork" not in trial.user_attrs and (done := _done(trial))
    ]
    if not of_a_step or max(of_a_step) > min(of_a_step) * (1 + _ALIKE):
        return []
    return [rung / of_a_step[0] for rung in rungs]


def _done(trial: FrozenTrial) -> float:
    """How much of the unit a trial has trained."""
    known = trial.user_attrs.get("spent", {})
    return next((float(amount) for unit, amount in known.items() if unit != "hour"), 0.0)
