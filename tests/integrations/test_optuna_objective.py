"""A recipe as the objective of Optuna's own `study.optimize`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from stoker.errors import BadInput, StokerError
from stoker.integrations.optuna import objective

from support import LONG, loaded, until

RECIPE = str(Path(__file__).parents[1] / "cli" / "searched.py")


def test_trials_are_runs_and_those_that_optuna_prunes_are_stopped_runs(tmp_path: Path) -> None:
    """Two at a time, in threads."""
    study = optuna.create_study(
        study_name="a study", sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2),
    )  # fmt: skip
    trained = objective(RECIPE, {"x": "uniform(0, 1)", "kind": "[near, far]"}, runs=tmp_path, n_jobs=2)
    study.optimize(trained, n_trials=8, n_jobs=2)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in study.trials:
        run = loaded(tmp_path / "a-study" / trial.user_attrs["run"])
        assert run.status == {"COMPLETE": "finished", "PRUNED": "stopped"}[trial.state.name]
        assert run.config["x"] == trial.params["x"]
        assert dict(run.points["val_loss"].items()) == trial.intermediate_values
        assert list(trial.intermediate_values.values())[-1] == trial.value
        assert run.tags["optuna.trial"] == str(trial.number)


def test_a_failed_run_is_a_failed_trial_with_its_error(tmp_path: Path) -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.9})
    study.enqueue_trial({"x": 0.1})
    trained = objective(RECIPE, {"x": "uniform(0, 1)", "fails": "raise"}, runs=tmp_path)
    study.optimize(trained, n_trials=2, catch=StokerError)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"]
    study.enqueue_trial({"x": 0.8})
    with pytest.raises(StokerError, match="this one cannot be trained"):
        study.optimize(trained, n_trials=1)


def test_a_function_of_a_file_is_a_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(RECIPE).parent)
    from searched import train

    study = optuna.create_study()
    study.optimize(objective(train, {"x": "uniform(0, 1)", "steps": 1}, runs=tmp_path), n_trials=1)
    assert study.best_value == pytest.approx((study.best_params["x"] - 0.3) ** 2 + 1)
    with pytest.raises(BadInput, match="define it at the top level"):
        objective(lambda run: None, {"x": "uniform(0, 1)"})


SCRIPT = """
import sys
import optuna
from stoker.integrations.optuna import objective

callback = optuna.storages.RetryFailedTrialCallback()
storage = optuna.storages.RDBStorage(
    sys.argv[1], heartbeat_interval=1, grace_period=2, failed_trial_callback=callback,
)
study = optuna.create_study(study_name="shared", storage=storage, load_if_exists=True)
trained = objective(sys.argv[2], {"x": "uniform(0, 1)", "waits": sys.argv[3]}, runs=sys.argv[4])
study.optimize(trained, n_trials=1)
"""


WAITS = """
import dataclasses, pathlib, time
import stoker

@dataclasses.dataclass(frozen=True)
class Config:
    x: float = 0.0
    waits: int = 0

def train(run: stoker.Run, config: Config):
    for step in range(run.step + 1, 4):
        run.log(val_loss=config.x + 1 / step, step=step)
        mark = pathlib.Path(__file__).with_name("waits")
        if step == config.waits and not mark.exists():
            mark.touch()
            time.sleep(600)
"""


def killed_at(step: int, folder: Path) -> optuna.Study:
    """A study of two processes: a script without a guard, killed at a step of its run, and this one."""
    script, recipe, url = folder / "script.py", folder / "recipe.py", f"sqlite:///{folder / 'a.db'}"
    script.write_text(SCRIPT, encoding="utf-8")
    recipe.write_text(WAITS, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(script), url, str(recipe), str(step), str(folder / "runs")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    until((folder / "waits").exists, first)
    others = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    assert not psutil.wait_procs(others, timeout=LONG)[1]
    storage = optuna.storages.RDBStorage(
        url, heartbeat_interval=1, grace_period=2,
        failed_trial_callback=optuna.storages.RetryFailedTrialCallback(),
    )  # fmt: skip
    study = optuna.load_study(study_name="shared", storage=storage)
    space = {"x": "uniform(0, 1)", "waits": str(step)}
    study.optimize(objective(recipe, space, runs=folder / "runs"), n_trials=2)
    return study


@pytest.mark.soak(small=False)
@pytest.mark.filterwarnings("ignore")  # of Optuna: a heartbeat is an experiment of its
def test_a_run_whose_process_was_killed_goes_on_in_another_process_of_the_study(tmp_path: Path) -> None:
    """By what Optuna has for it: a heartbeat, and its callback for failed trials."""
    lost, *others = killed_at(2, tmp_path).trials
    assert lost.state == TrialState.FAIL
    (again,) = [t for t in others if t.user_attrs["run"] == lost.user_attrs["run"]]
    assert again.state == TrialState.COMPLETE
    run = loaded(tmp_path / "runs" / "shared" / again.user_attrs["run"])
    assert len(run.attempts) == 2
    assert [step for step, _ in run.points["val_loss"].items()] == [1, 2, 3]


@pytest.mark.soak(small=False)
@pytest.mark.filterwarnings("ignore")  # of Optuna: a heartbeat is an experiment of its
def test_a_run_whose_process_was_killed_after_its_last_value_has_that_value(tmp_path: Path) -> None:
    """As during an export or a last test, after which there is nothing left to train."""
    lost, *others = killed_at(3, tmp_path).trials
    (again,) = [t for t in others if t.user_attrs["run"] == lost.user_attrs["run"]]
    assert (again.state, again.value) == (TrialState.COMPLETE, again.params["x"] + 1 / 3)


@pytest.mark.parametrize(
    ("space", "said"),
    [({"y": "uniform(0, 1)"}, "y"), ({"x": 0.5}, "nothing is searched"), ({"x": "uniform(1, 0)"}, "uniform")],
)
def test_what_cannot_be_searched_is_refused_before_the_study_begins(space: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        objective(RECIPE, space)
