"""The second stage of a staged search: within what the best span, learning from those that wait."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from stoker.tune import promising, samplers, stores
from stoker.tune import study as studies
from stoker.tune.space_reading import parse

from support import SOAK


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
    best = promising.best_of(study, 16)
    assert [t.number for t in best] == [0, 1, 2, 3]
    found = promising.region(DISTRIBUTIONS, best)
    low, high = found["lr"].low, found["lr"].high
    assert (low, high) == pytest.approx((10**-2.35, 10**-0.4)), "and a tenth of the whole range on each side"
    assert found["layers"] == IntDistribution(1, 8)
    assert found["kind"] == DISTRIBUTIONS["kind"]


def test_the_best_are_those_that_came_furthest_then_by_value() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(trial(0.1, 1, 0.9, 1, TrialState.PRUNED))
    study.add_trial(trial(0.1, 2, 0.5, 9, TrialState.PRUNED))
    study.add_trial(trial(0.1, 3, 0.1, 27, TrialState.COMPLETE))
    study.add_trial(trial(0.1, 4, 0.6, 9, TrialState.PRUNED))
    for _ in range(12):
        study.add_trial(trial(0.1, 5, 0.0, 1, TrialState.PRUNED))
    assert [t.number for t in promising.best_of(study, 16)] == [2, 3, 1, 0]


def test_few_trials_narrow_nothing() -> None:
    study = optuna.create_study()
    for n in range(12):
        study.add_trial(trial(0.1, 1 + n, float(n), 3, TrialState.PRUNED))
    assert promising.region(DISTRIBUTIONS, promising.best_of(study, 12)) == DISTRIBUTIONS


@pytest.mark.parametrize("name", ["tpe", "staged"])
def test_a_trial_that_waits_at_a_rung_teaches_the_sampler(name: str, tmp_path: Path) -> None:
    """Most of ASHA's wait to the end of the search: without them, TPE would draw at random."""
    file = stores.JournalFile(tmp_path / "study.journal")
    study = studies.opened(file, samplers.make(name, SPACE, 0, trials=60), ["min"])
    drawn = []
    for _ in range(60):
        with studies.quiet(), file.together():
            asked = study.ask()
            params = SPACE.suggest(asked)
            asked.report((params["layers"] - 20) ** 2, 1)  # and it is never told how it ended
        drawn.append(abs(params["layers"] - 20))
    assert sum(drawn[30:]) < 0.65 * sum(drawn[:30])


@dataclass(frozen=True)
class Point:
    x: float = 0.0
    y: float = 0.0


PLANE = parse(["x=uniform(0, 1)", "y=uniform(0, 1)"], Point)


def _nearest(name: str, seed: int, folder: Path, optimum: tuple[float, float]) -> float:
    file = stores.JournalFile(folder / f"{name}-{seed}")
    study = studies.opened(file, samplers.make(name, PLANE, seed, trials=40), ["min"])
    for _ in range(40):
        with studies.quiet(), file.together():
            asked = study.ask()
            drawn = PLANE.suggest(asked)
        study.tell(asked, (drawn["x"] - optimum[0]) ** 2 + (drawn["y"] - optimum[1]) ** 2)
    return float(study.best_value)


def test_the_second_stage_comes_nearer_than_chance_also_to_a_corner(tmp_path: Path) -> None:
    for optimum in ((0.97, 0.03), (0.5, 0.5)):
        folder = tmp_path / str(optimum)
        folder.mkdir()
        found = {
            name: statistics.median(_nearest(name, seed, folder, optimum) for seed in range(5))
            for name in ("staged", "random")
        }
        assert found["staged"] < found["random"] / 5, optimum


@pytest.mark.soak
@pytest.mark.parametrize("name", ["tpe", "gp", "staged"] if SOAK else ["tpe", "staged"])
def test_of_several_objectives_too_a_trial_that_waits_or_was_pruned_teaches_the_sampler(
    name: str, tmp_path: Path
) -> None:
    drawn: dict[str, list[float]] = {}
    for sampler in (name, "random"):
        file = stores.JournalFile(tmp_path / sampler)
        study = studies.opened(file, samplers.make(sampler, PLANE, 0, trials=28), ["min", "min"])
        drawn[sampler] = []
        for number in range(28):
            with studies.quiet(), file.together():
                asked = study.ask()
                point = PLANE.suggest(asked)
                values = [point["x"] + point["y"], 1 - point["x"] + point["y"]]  # the front is at y = 0
                asked.set_user_attr(promising.NEWEST, {"step": 1, "values": values})
            drawn[sampler].append(point["y"])
            if number % 2:
                study.tell(asked, state=TrialState.PRUNED)
    assert statistics.mean(drawn[name][-10:]) < statistics.mean(drawn["random"][-10:]) / 1.5
