"""The learning curves of a search."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from stoker.report import sweep_curves


def _trial(number: int, values: dict[int, float], **about: Any) -> FrozenTrial:
    made = create_trial(state=TrialState.COMPLETE, value=[*values.values()][-1], intermediate_values=values)
    made.number = number
    for name, value in about.items():
        made.set_user_attr(name, value)
    return made


def test_rungs_are_drawn_at_the_steps_where_they_are() -> None:
    trials = [
        _trial(n, {10 * s: 1.0 / s for s in (1, 2, 3)}, spent={"epoch": 3.0, "hour": 1.0}) for n in (0, 1)
    ]
    figure = sweep_curves.figure(trials, [1.0, 2.0], 0, "loss")
    assert [shape.x0 for shape in figure.layout.shapes] == pytest.approx([10.0, 20.0])
    assert [trace.line.width for trace in figure.data] == [3, 1]


def test_no_rungs_are_drawn_where_a_step_is_more_to_one_trial_than_to_another() -> None:
    trials = [_trial(n, {10: 1.0, 20: 0.5}, spent={"epoch": 2.0 + n}) for n in (0, 1)]
    assert not sweep_curves.figure(trials, [1.0], 0, "loss").layout.shapes


def test_a_lineage_is_one_continuous_curve() -> None:
    first = _trial(0, {1: 1.0, 2: 0.8, 3: 0.7})
    second = _trial(1, {3: 0.6, 4: 0.5}, fork={"donor": 0, "step": 2, "replaces": 5})
    third = _trial(2, {5: 0.3, 6: 0.2}, fork={"donor": 1, "step": 4, "replaces": 6})
    known = {trial.number: trial for trial in (first, second, third)}
    before = sweep_curves.inherited(third, known)
    assert before == {1: 1.0, 2: 0.8, 3: 0.6, 4: 0.5}
    figure = sweep_curves.figure([*known.values()], (), None, "loss")
    dotted = [trace for trace in figure.data if trace.line.dash == "dot" and trace.name == "trial 2"]
    assert [[*trace.x] for trace in dotted] == [[1, 2, 3, 4, 5]]
