"""The report of a search."""

from __future__ import annotations

import re

import optuna
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
