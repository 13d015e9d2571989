"""What a population learns of values by what they have gained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from stoker.tune import bandit, space_reading
from stoker.tune.bandit import Gain
from stoker.tune.schedulers import PopulationBased


@dataclass(frozen=True)
class Config:
    """Keys of a recipe."""

    lr: float = 1e-3
    x: float = 0.0
    kind: str = "a"


TURN = PopulationBased(every=10, population=8).turn
SPACE = space_reading.parse(["lr=log(1e-5, 1e-1)", "x=uniform(0, 1) if kind != c", "kind=[a, b, c]"], Config)


def _seen(best: Callable[[int], float], seed: int) -> list[Gain]:
    """Four members over ten comparisons; what is gained falls off from the best x, and `b` adds to it."""
    random = np.random.default_rng(seed)
    found = []
    for turn in range(1, 11):
        for _ in range(4):
            values = SPACE.drawn(random)
            gain = 1 - 4 * (values.get("x", 0.0) - best(turn)) ** 2 + 0.3 * (values["kind"] == "b")
            found.append(Gain(turn, values, gain + 0.05 * random.normal()))
    return found


def _median_x(best: Callable[[int], float]) -> float:
    chosen = [
        bandit.chosen(SPACE, _seen(best, seed), 11, [], np.random.default_rng(100 + seed))
        for seed in range(5)
    ]
    assert all(values is not None and values["kind"] == "b" for values in chosen)
    return float(np.median([values["x"] for values in chosen if values is not None]))


def test_values_are_chosen_where_most_was_gained() -> None:
    assert _median_x(lambda turn: 0.7) == pytest.approx(0.7, abs=0.1)


def test_what_was_gained_lately_counts_for_more() -> None:
    assert _median_x(lambda turn: 0.2 if turn < 6 else 0.8) > 0.6


def test_the_same_choice_is_made_of_the_same_record() -> None:
    seen = _seen(lambda turn: 0.5, 0)
    first, second = (bandit.chosen(SPACE, seen, 11, [], np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_what_another_member_tries_now_is_less_of_a_riddle() -> None:
    seen = [gain for gain in _seen(lambda turn: 0.5, 0) if gain.turn > 8]
    alone = bandit.chosen(SPACE, seen, 11, [], np.random.default_rng(7))
    assert alone is not None
    beside = bandit.chosen(SPACE, seen, 11, [alone] * 3, np.random.default_rng(7))
    assert beside is not None
    assert beside != alone


def test_nothing_is_chosen_of_too_little() -> None:
    assert bandit.chosen(SPACE, _seen(lambda turn: 0.5, 0)[:3], 2, [], np.random.default_rng(0)) is None


def test_a_member_gains_from_one_comparison_to_the_next_and_not_what_its_donor_did() -> None:
    curve = {5.0: 9.0, 10.0: 8.0, 15.0: 6.5, 20.0: 6.0, 30.0: 3.0, 40.0: 2.5}
    own = [(gain.turn, gain.gain) for gain in bandit.gains({"x": 0.5}, curve, 10.0, TURN)]
    assert own == [(2, 2.0), (3, 3.0), (4, 0.5)]
    assert [gain.turn for gain in bandit.gains({"x": 0.5}, curve, 20.0, TURN)] == [3, 4]
    assert bandit.gains({}, {3.0: 1.0, 7.0: 0.5}, 0.0, TURN) == []
