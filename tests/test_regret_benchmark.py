"""The benchmark of what searches find: real searches, small, and what is made of their losses."""

from __future__ import annotations

import importlib
import math
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stoker.tune.schedulers import Asha, Decision, Known

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("regret")


@pytest.mark.soak(small=False)
def test_real_searches_are_compared_by_trials_and_by_epochs(bench: ModuleType, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def run(what: str, *, arm: str, **options: Any) -> Any:
        found[arm] = bench.harness.measure(bench.HERE, what, arm=arm, folder=str(tmp_path), **options)
        return found[arm]

    rows = bench.table(run, bench.Size(seeds=1, trials=4, epochs=4), tmp_path / "regret.html")
    assert [row.measure for row in rows] == [
        "tpe, regret after 1 trials", "tpe, regret after 2 trials", "tpe, regret after 4 trials",
        "asha, regret after 4 epochs", "asha, regret after 8 epochs", "asha, regret after 16 epochs",
    ]  # fmt: skip
    whole, asha = found["random"], found["asha"]
    assert whole["trials"] == whole["epochs"][3::4], "a trial's loss is that of its last epoch"
    assert whole["trials"] == found["tpe"]["trials"], "TPE begins with random values, of the same seed"
    assert len(asha["trials"]) > 4
    ends = [value for value in asha["trials"] if math.isfinite(value)]
    assert 0 < len(ends) < len(asha["trials"]), "a training that ended early has no loss at its end"
    assert set(ends) < set(asha["epochs"])
    assert asha["epochs"][0] == whole["epochs"][0], "ASHA begins with the same values"
    for row in rows:
        best = min(min(one["epochs"]) for one in found.values())
        assert 0 <= row.ours <= bench.GUESS - best
    assert rows[2].peers["random"] == min(whole["trials"]) - min(min(one["epochs"]) for one in found.values())
    page = (tmp_path / "regret.html").read_text()
    assert "4 trials" in page
    assert page.count('data-of="drawings"') == 2


def test_regret_is_of_the_best_so_far_and_epochs_are_equal(bench: ModuleType) -> None:
    found = {
        "random": [{"trials": [2.0, 0.5], "epochs": [3.0, 2.0, 1.0, 0.5]}],
        "tpe": [{"trials": [0.25, 1.0], "epochs": [0.5, 0.25, 2.0, 1.0]}],
        "asha": [{"trials": [], "epochs": [1.5, 0.75, 1.0, 0.5, 0.1]}],
    }
    by_trials, by_epochs = bench.regrets(found)
    assert by_trials == {
        "random": [[pytest.approx(1.9), pytest.approx(0.4)]],
        "tpe": [[pytest.approx(0.15), pytest.approx(0.15)]],
    }
    assert by_epochs["asha"] == [[pytest.approx(v) for v in (1.4, 0.65, 0.65, 0.4)]]
    assert by_epochs["whole trainings"][0][0] == pytest.approx(bench.GUESS - 0.1), "worse than a guess"


def test_the_goal_is_a_lower_median_whatever_single_seeds_say(bench: ModuleType) -> None:
    ours = [1.0, 1.0, 1.0, 9.0, 9.0]
    curves = {"tpe": [[v] * 4 for v in ours], "random": [[2.0] * 4 for _ in ours]}
    row = bench.compared(curves, "tpe", "random", "trials")[-1]
    assert (row.ours, row.peers, row.met) == (1.0, {"random": 2.0}, True)
    assert (row.lower_in, row.higher_in, row.seeds) == (3, 2, 5)
    assert row.quartiles == {"tpe": (1.0, 9.0), "random": (2.0, 2.0)}
    assert row.p > 0.05, "five seeds of which two are far worse show nothing"
    same = bench.compared({**curves, "tpe": curves["random"]}, "tpe", "random", "trials")[-1]
    assert (same.met, same.p) == (False, 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_asha_is_given_trials_enough_to_spend_the_epochs(seed: int, bench: ModuleType) -> None:
    """The paper's rule itself, one trial at a time, on losses that are drawn."""
    budget, epochs = 40 * 9, 9
    draw = random.Random(seed)
    rule = Asha(bench.LEAST, epochs, bench.FACTOR)
    table: dict[int, Known] = {}
    for _ in range(10_000):
        number = rule.resumes(table)
        if number is None:
            number = len(table)
            if number == bench.enough(budget, epochs):
                break
            table[number] = Known(number, {}, "running")
        decision = Decision.CONTINUE
        while decision is Decision.CONTINUE and len(table[number].values) < epochs:
            reported = {**table[number].values, len(table[number].values) + 1.0: draw.random()}
            table[number] = Known(number, reported, "running")
            decision = rule.decide(table, number)
        table[number] = replace(table[number], state="paused" if decision is Decision.PAUSE else "complete")
    assert budget <= sum(len(known.values) for known in table.values()) < 1.25 * budget
