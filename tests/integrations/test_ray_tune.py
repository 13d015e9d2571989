"""A recipe as a trainable of Ray Tune, driven by its own schedulers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from stoker.errors import BadInput
from stoker.integrations.ray_tune import trainable

from support import loaded

RECIPE = str(Path(__file__).parents[1] / "cli" / "quadratic.py")
FIXED = {"precision": "fp32", "steps": 40}


@pytest.fixture(scope="module")
def of_ray() -> Iterator[None]:
    """A Ray of its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    answer = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, answer)  # which Ray has taken


class KillsOnce(tune.Callback):  # type: ignore[misc]
    """Ends the actor of one trial by SIGKILL, once it has come to a step."""

    def __init__(self, h0: float, step: int) -> None:
        self._h0, self._step, self.killed = h0, step, False

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if not self.killed and trial.config["h0"] == self._h0 and result["step"] >= self._step:
            self.killed = True
            psutil.Process(result["pid"]).send_signal(signal.SIGKILL)


@pytest.mark.soak(small=False)
@pytest.mark.usefixtures("of_ray")
def test_asha_stops_trials_and_one_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    kills = KillsOnce(1.0, 17)
    results = tune.Tuner(
        trainable(RECIPE, FIXED, metric="score", runs=tmp_path / "runs"),
        # Two run at a time; the last, which begins when another is done, is the worst, so that it is stopped.
        param_space={"h0": tune.grid_search([1.0, 0.2, 0.1]), "h1": 1.0},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", reuse_actors=True,
            scheduler=ASHAScheduler(time_attr="step", max_t=80, grace_period=5, reduction_factor=2),
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"), name="asha", verbose=0, callbacks=[kills],
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=5),
        ),
    ).fit()  # fmt: skip
    assert kills.killed
    assert not results.errors
    best = results.get_best_result()
    assert (best.metrics["step"], best.config["h0"]) == (40, 1.0)
    assert best.metrics["training_iteration"] == 40
    assert {"loss", "score", "first"} <= best.metrics.keys()
    statuses = set()
    for result in results:
        run = loaded(tmp_path / "runs" / result.metrics["run"])
        steps = [step for step, _ in run.points["score"].items()]
        assert steps[: result.metrics["step"]] == list(range(1, int(result.metrics["step"]) + 1))
        assert run.points["score"].until(result.metrics["step"]) == result.metrics["score"]
        assert len(run.attempts) == (2 if result.config["h0"] == 1.0 else 1)
        statuses.add(run.status)
    assert statuses == {"finished", "stopped"}


@pytest.mark.soak(small=False)
@pytest.mark.usefixtures("of_ray")
def test_population_based_training_goes_on_from_anothers_weights_optimizer_and_data(tmp_path: Path) -> None:
    """Two members that take turns."""
    made = trainable(RECIPE, FIXED, metric="score", runs=tmp_path, experiment="pbt")
    results = tune.Tuner(
        tune.with_resources(made, {"cpu": 2}),
        param_space={"h0": tune.grid_search([1.0, 0.0]), "h1": 0.5},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", reuse_actors=True,
            scheduler=PopulationBasedTraining(
                time_attr="step", perturbation_interval=10, quantile_fraction=0.5, resample_probability=0.0,
                hyperparam_mutations={"h0": [0.0, 0.5, 1.0]},
            ),
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), name="pbt", verbose=0),
    ).fit()  # fmt: skip
    assert not results.errors
    runs = {file.parent.name: loaded(file.parent) for file in tmp_path.glob("pbt/*/run.json")}
    forked = [run for run in runs.values() if "forked.from" in run.tags and "score" in run.points]
    assert forked
    for run in forked:
        donor, at = runs[run.tags["forked.from"]], int(run.tags["forked.at"])
        own = dict(run.points["score"].items())
        assert min(own) == at + 1
        assert own[at + 1] == pytest.approx(donor.points["score"].until(at), abs=0.1), "one continuous curve"
        order = dict(donor.points["first"].items())
        assert {n: v for n, v in run.points["first"].items() if n in order} == {
            n: v for n, v in order.items() if n in own
        }


def test_what_is_no_key_of_the_recipe_is_refused_before_anything_starts() -> None:
    with pytest.raises(BadInput, match="did you mean 'steps'"):
        trainable(RECIPE, {"step": 3})
