"""The report of a search."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import optuna
from optuna.trial import TrialState
from stoker.report import sweep


def test_the_front_is_that_of_its_own_trials() -> None:
    """An earlier search that it learnt from may have better ones."""
    study = optuna.create_study(directions=["minimize", "maximize"])
    lr = optuna.distributions.FloatDistribution(0, 10)
    for number, values in enumerate([(0.1, 9.0), (0.5, 5.0), (0.4, 4.0), (0.6, 4.5)]):
        about = {"earlier": "first"} if number == 0 else {"run": f"trial-000{number}"}
        trial = optuna.create_trial(
            params={"lr": number}, distributions={"lr": lr}, values=values, user_attrs=about
        )
        study.add_trial(trial)
    record = {
        "metric": "val_loss, speed", "goal": "min, max", "sampler": "tpe", "scheduler": "none",
        "recipe": "a.py", "seed": 0,
    }  # fmt: skip
    best = sweep.render(study, record, "second").partition("Best</h2>")[2].partition("</section>")[0]
    assert re.findall(r"trial-\d+", best) == ["trial-0002", "trial-0001"]


def _several(*trials: optuna.trial.FrozenTrial, record: dict[str, Any] | None = None) -> str:
    """The page about a search with the largest accuracy and the fewest operations."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trials(trials)
    about = {
        "metric": "acc, flops", "goal": "max, min", "sampler": "random", "scheduler": "none",
        "recipe": "a.py", "seed": 0,
    }  # fmt: skip
    return sweep.render(study, about, "several")


def test_what_decides_over_the_largest_values_is_important_for_them() -> None:
    """The best accuracies differ by a only, the worst by b."""
    unit = optuna.distributions.FloatDistribution(0, 1)
    trials = []
    for a, b in itertools.product([step / 9 for step in range(10)], repeat=2):
        values = (a if b > 0.3 else -10 + 5 * b, a)
        trials.append(
            optuna.create_trial(params={"a": a, "b": b}, distributions={"a": unit, "b": unit}, values=values)
        )
    page = _several(*trials)
    place = page.index("Parameter importance: acc</h2>")
    index = int(re.search(r'data-index="(\d+)"', page[place:])[1])  # type: ignore[index]
    drawing = _drawings(page)[index]["data"][0]
    shares = dict(zip(drawing["y"], drawing["x"], strict=True))
    assert shares["a"] > 0.9


def _drawings(page: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(
        page[page.index('{"', page.index('"drawings"') - 3) :]
    )[0]["drawings"]
    return found


def test_trials_that_ended_early_have_all_their_values_and_the_folder_of_their_sweep() -> None:
    about = {"newest": {"step": 3, "values": [0.75, 4096.0]}, "values": [[3, 0.75]], "run": "trial-0000"}
    early = optuna.create_trial(state=TrialState.PRUNED, user_attrs={**about, "sweep": "there"})
    page = _several(early)
    for title in ("Best", "Trials"):
        part = page.partition(f"{title}</h2>")[2].partition("</section>")[0]
        assert "there/trial-0000" in part
        assert "0.75" in part
        assert "4,096" in part or "4096" in part
