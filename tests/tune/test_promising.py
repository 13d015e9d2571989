"""The second stage of a staged search: within what the best span, learning from those that wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from stoker.tune import promising
from stoker.tune import study as studies
from stoker.tune.space import parse


@dataclass(frozen=True)
class Config:
    lr: float = 1e-3
    layers: int = 1
    kind: str = "a"


SPACE = parse(["lr=log(1e-6, 1)", "layers=int(1, 32)", "kind=[a, b]"], Config)
DISTRIBUTIONS = {
    "lr": FloatDistribution(1e-6, 1.0, log=True), "layers": IntDistribution(1, 32),
    "kind": CategoricalDistribution(("a", "b")),
}  # fmt: skip


def trial(
    lr: float, layers: int, value: float | None, reached: int, state: TrialState
) -> optuna.trial.FrozenTrial:
    return create_trial(
        state=state, params={"lr": lr, "layers": layers, "kind": "a"}, distributions=DISTRIBUTIONS,
        value=value if state == TrialState.COMPLETE else None, intermediate_values={reached: value or 0.0},
    )  # fmt: skip


def test_the_region_is_what_the_best_quarter_spans() -> None:
    study = optuna.create_study()
    for n in range(16):
        study.add_trial(trial(10 ** -(1 + n / 4), 2 + n, float(n), 3, TrialState.PRUNED))
    best = promising.best_of(study)
    assert [t.number for t in best] == [0, 1, 2, 3]
    found = promising.region(DISTRIBUTIONS, best)
    assert found["lr"] == FloatDistribution(10**-1.75, 10**-1, log=True)
    assert found["layers"] == IntDistribution(2, 5)
    assert found["kind"] == DISTRIBUTIONS["kind"]


def test_the_best_are_those_that_came_furthest_then_by_value() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(trial(0.1, 1, 0.9, 1, TrialState.PRUNED))
    study.add_trial(trial(0.1, 2, 0.5, 9, TrialState.PRUNED))
    study.add_trial(trial(0.1, 3, 0.1, 27, TrialState.COMPLETE))
    study.add_trial(trial(0.1, 4, 0.6, 9, TrialState.PRUNED))
    for _ in range(12):
        study.add_trial(trial(0.1, 5, 0.0, 1, TrialState.PRUNED))
    assert [t.number for t in promising.best_of(study)] == [2, 3, 1, 0]


def test_few_trials_narrow_nothing() -> None:
    study = optuna.create_study()
    for n in range(12):
        study.add_trial(trial(0.1, 1 + n, float(n), 3, TrialState.PRUNED))
    assert promising.region(DISTRIBUTIONS, promising.best_of(study)) == DISTRIBUTIONS


@pytest.mark.parametrize("name", ["tpe", "staged"])
def test_a_trial_that_waits_at_a_rung_teaches_the_sampler(name: str, tmp_path: Path) -> None:
    """Most of ASHA's wait to the end of the search: without them, TPE would draw at random."""
    file = studies.JournalFile(tmp_path / "study.journal")
    study = studies.opened(file, studies.sampler(name, SPACE, 0, trials=60), ["min"])
    drawn = []
    for _ in range(60):
        with studies.quiet(), file.together():
            asked = study.ask()
            params = SPACE.suggest(asked)
            asked.report((params["layers"] - 20) ** 2, 1)  # and it is never told how it ended
        drawn.append(abs(params["layers"] - 20))
    assert sum(drawn[30:]) < 0.65 * sum(drawn[:30])
