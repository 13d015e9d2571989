"""`stoker.sweep`: a search from Python is the command's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stoker.errors import BadInput, StokerError
from stoker.integrations.sweeping import Sweep, sweep
from stoker.tune import stores
from stoker.tune import study as studies

from commands import Command
from support import LONG, loaded, until

SEARCHED = Path(__file__).parents[1] / "cli" / "searched.py"
QUADRATIC = SEARCHED.with_name("quadratic.py")
SPACE = {"x": "uniform(0, 1)", "kind": "[near, far]", "steps": 4}

SCRIPT = """
import json
import os
import time
from dataclasses import dataclass
import stoker

@dataclass(frozen=True)
class Config:
    x: float = 0.0
    pause: float = 0.0

def train(run: stoker.Run, config: Config) -> None:
    for step in range(run.step + 1, 41):
        time.sleep(config.pause * float(os.environ.get("SLOWER", "1")))
        run.log(step=step, val_loss=config.x + 1 / step)

if GUARD:
    space = {"x": "uniform(0, 1)", "pause": PAUSE}
    found = stoker.sweep(train, space, trials=4, parallel=2, seed=1, name="s")
    best = found.best and found.best.number
    print(json.dumps([found.over, best, [[trial.params["x"], trial.error] for trial in found.trials]]))
"""

IN_WORKERS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import stoker
from searches import train

def one(name: str) -> int:
    return len(stoker.sweep(train, {"x": "uniform(0, 1)"}, trials=1, name=name).trials)

if __name__ == "__main__":
    found = [one("here")]
    for kind in ("fork", "spawn"):
        context = multiprocessing.get_context(kind)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found += pool.map(one, [kind])
    assert found == [1, 1, 1]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(one, ["daemonic"])
"""


def _values(found: Sweep) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.params, t.value, t.parent, t.values) for t in found.trials]


def test_it_is_the_search_of_the_command_and_goes_on(stoker: Command, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tries": [{"x": 0.25, "kind": "near"}], "sampler": "random", "seed": 3}
    found = sweep(str(SEARCHED), SPACE, trials=3, **asked, runs=tmp_path / "here", name="s")
    assert found.over
    assert found.best is not None
    assert found.front == (found.best,)
    assert found.best.params["x"] == 0.25
    assert found.best.objectives == {"val_loss": found.best.value}
    assert loaded(found.best.run).last("val_loss") == found.best.value
    more = sweep(SEARCHED, SPACE, trials=5, **asked, runs=tmp_path / "here", name="s")
    assert _values(more)[:3] == _values(found)
    given = [f"{key}={value}" for key, value in SPACE.items()]
    options = ("--sampler", "random", "--seed", "3", "--try", "x=0.25,kind=near", "--trials", "5")
    done = stoker("sweep", str(SEARCHED), *given, *options, "--name", "s", "--json")
    assert done.code == 0, done.err
    told = [
        (t["number"], t["state"], t["params"], t["value"], t["parent"], tuple(map(tuple, t["values"])))
        for t in done.answer["trials"]
    ]
    assert told == _values(more)
    again = stoker(
        "sweep", str(SEARCHED), *given, *options, "--name", "s", "--json", "--runs", str(tmp_path / "here")
    )
    assert again.code == 0, again.err
    assert len(list((tmp_path / "here" / "s").glob("trial-*"))) == 5, "the command goes on with it"


def _script(folder: Path, *, pause: float = 0.0, guard: str = "__name__ == '__main__'") -> list[str]:
    script = folder / "searches.py"
    script.write_text(SCRIPT.replace("PAUSE", str(pause)).replace("GUARD", guard), encoding="utf-8")
    return [sys.executable, str(script)]


def test_a_script_searches_over_its_own_function_and_goes_on_after_a_signal(tmp_path: Path) -> None:
    slower = {**os.environ, "SLOWER": "20"}  # it is far from its end when the signal comes
    process = subprocess.Popen(
        _script(tmp_path, pause=0.05), cwd=tmp_path, stderr=subprocess.PIPE, env=slower
    )
    trials = tmp_path / "runs" / "s"
    until(lambda: len(list(trials.glob("trial-*/journal"))) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 75, err.decode()
    assert "the same search continues" in err.decode()
    script = _script(tmp_path)
    refused = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=LONG, check=False)
    assert refused.returncode == 1
    assert "BadInput" in refused.stderr
    assert "pause" in refused.stderr, "another space is another search"
    script = _script(tmp_path, pause=0.05)
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=LONG, check=True)
    assert re.search(r"^stoker: trial 3 complete: val_loss .*; best", done.stderr, re.MULTILINE), done.stderr
    over, best, drawn = json.loads(done.stdout)
    assert over
    assert best == min(range(4), key=lambda number: drawn[number][0])
    for trial in trials.glob("trial-*"):
        assert list(loaded(trial).points["val_loss"]) == list(range(1, 41))


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path: Path) -> None:
    script = _script(tmp_path, guard="True")
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.stderr.splitlines()[-1].startswith(
        "stoker.errors.StokerError: every trial failed, the first with: stoker.sweep is called while a file "
        "is imported; call it below if __name__ == '__main__':"
    )


@pytest.mark.soak(small=False)
def test_worker_processes_of_a_script_search_if_they_may_have_children(tmp_path: Path) -> None:
    _script(tmp_path)
    workers = tmp_path / "workers.py"
    workers.write_text(IN_WORKERS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(workers)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert "use concurrent.futures.ProcessPoolExecutor" in done.stderr.splitlines()[-1], done.stderr
    assert {folder.name for folder in (tmp_path / "runs").glob("[!.]*")} == {"fork", "here", "spawn"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"space": {"y": "uniform(0, 1)"}}, "y"),
        ({"space": {"x": 1}}, "the search space is empty"),
        ({"metric": ["a", "a"]}, "give each metric once"),
        ({"metric": "cost"}, "its direction is not known; give --goal"),
        ({"on": "slurm"}, "stoker sweep --on slurm"),
        ({"least": 2}, "give one, or leave them out"),
        ({"recipe": lambda run: None}, "define it at the top level"),
        ({"recipe": "imag"}, "did you mean 'image'"),
        ({"runs": "s3://bucket/runs"}, "a search cannot be in an object store"),
        ({"tries": {"x": 2}}, "x"),
        ({"seed": None}, "--seed None: give a whole number"),
        ({"quantile": "0.25", "scheduler": "pbt", "least": 2}, "--quantile '0.25': give a number"),
        ({"perturb": (0.8,), "scheduler": "pbt", "least": 2}, "--perturb 0.8: give two factors"),
        ({"perturb": 2, "scheduler": "pbt", "least": 2}, "--perturb 2: give two factors"),
        ({"parallel": "2"}, "--parallel '2': give a whole number"),
        ({"max_time": 60}, "--max-time '60' is not a length of time"),
        ({"nproc": 0}, "--nproc 0: give a whole number of 1 or more"),
        ({"trials": "3"}, "--trials 3: give a whole number"),
        ({"seed": -1}, "--seed -1"),
        ({"max_failures": -1}, "--max-failures -1"),
        ({"max_time": "4x"}, "--max-time '4x'"),
    ],
)
def test_what_cannot_be_searched_starts_nothing(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"recipe": SEARCHED, "space": SPACE, "runs": tmp_path / "runs"}
    with pytest.raises(BadInput, match=said):
        sweep(**{**asked, **arguments})
    assert not (tmp_path / "runs").exists()


def test_what_is_written_as_for_the_command_or_as_values_is_the_same(tmp_path: Path) -> None:
    """A population, whose members tell where they come from."""
    space = {("h0", "h1"): [(1.0, 0.0), (0.0, 1.0)], "steps": 8}
    given: dict[str, Any] = {
        "metric": "score", "goal": "max", "scheduler": "pbt", "least": 5, "quantile": 0.5, "trials": 2,
        "tries": [{"h0": 1.0}, {"h0": 0.0}], "runs": tmp_path, "name": "s",
    }  # fmt: skip
    found = sweep(QUADRATIC, space, perturb="0.5,2", **given)
    assert all((trial.params["h0"], trial.params["h1"]) in space["h0", "h1"] for trial in found.trials)
    forked = [trial for trial in found.trials if trial.parent is not None]
    assert forked
    for trial in forked:
        assert trial.parent is not None
        assert trial.values[:5] == found.trials[trial.parent].values[:5]
        assert [step for step, _ in trial.values] == list(range(1, 9))
        assert trial.values[-1][1] == trial.value
    text = {"(h0, h1)": "[(1.0, 0.0), (0.0, 1.0)]", "steps": 8}
    assert sweep(QUADRATIC, text, perturb=(0.5, 2), **given).trials == found.trials


def test_a_study_in_a_file_is_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    given: dict[str, Any] = {"trials": 1, "runs": tmp_path / "runs", "name": "s"}
    url = f"sqlite:///{tmp_path}/rel.db"
    monkeypatch.chdir(tmp_path)
    (trial,) = sweep(SEARCHED, SPACE, **given, storage="sqlite:///rel.db").trials
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(BadInput, match=f"storage: {url} -> sqlite:///{tmp_path}/other/rel.db"):
        sweep(SEARCHED, SPACE, **given, storage="sqlite:///rel.db")
    assert sweep(SEARCHED, SPACE, **given, storage=url).trials == (trial,)
    assert len(studies.of(tmp_path / "runs" / "s").trials) == 1
    (tmp_path / "rel.db").unlink()
    for call in (
        lambda: sweep(SEARCHED, SPACE, **given, storage=url), lambda: studies.of(tmp_path / "runs" / "s")
    ):  # fmt: skip
        with pytest.raises(BadInput, match="there is no file"):
            call()
    assert not (tmp_path / "rel.db").exists()
    assert not any((tmp_path / "other").iterdir())
    stores.Database(url)
    with pytest.raises(BadInput, match=r"the study of the search in .* is not in sqlite"):
        sweep(SEARCHED, SPACE, **given, storage=url)
    assert loaded(trial.run).status == "finished"


def test_a_trial_that_fails_says_why(tmp_path: Path) -> None:
    space = {"x": "[0.7, 0.1]", "fails": "raise"}
    with pytest.raises(StokerError, match="every trial failed, the first with: RuntimeError: this one"):
        sweep(SEARCHED, space, tries={"x": 0.7}, trials=1, runs=tmp_path)
    found = sweep(SEARCHED, space, tries=[{"x": 0.7}, {"x": 0.1}], trials=2, runs=tmp_path, name="two")
    failed, complete = found.trials
    assert (failed.state, found.best) == ("failed", complete)
    assert "Traceback" in failed.error
    assert "this one cannot be trained" in failed.error
    with pytest.raises(StokerError, match="more than --max-failures"):
        sweep(SEARCHED, space, tries={"x": 0.7}, trials=3, max_failures=0, runs=tmp_path, name="three")
