"""`stoker sweep`: trials are runs, whatever happens to them or to the one who has them run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage

import families
from browser import Browser, needs_chromium
from commands import Command, Start
from support import LONG, SOAK, loaded, until

RECIPE = str(Path(__file__).parent / "searched.py")
SPACE = ("x=uniform(0, 1)", "kind=[near, far]")
_KILLS = 20 if SOAK else 6


def trials(sweep: Path) -> list[optuna.trial.FrozenTrial]:
    """As Optuna itself reads them."""
    storage = JournalStorage(JournalFileBackend(str(sweep / "study.journal")))
    return optuna.load_study(study_name="sweep", storage=storage).trials


def brief(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a sweep came to, without paths."""
    return [
        (t["number"], t["state"], t["value"], tuple(t["params"].items()), t["values"])
        for t in answer["trials"]
    ]


def test_every_trial_is_a_run_and_the_best_is_named(stoker: Command, tmp_path: Path) -> None:
    done = stoker("sweep", RECIPE, *SPACE, "--trials", "12", "--parallel", "2", "--json")
    assert done.code == 0, done.err
    answer = done.answer
    assert [t["number"] for t in answer["trials"]] == list(range(12))
    assert {t["state"] for t in answer["trials"]} == {"complete"}
    best = min(answer["trials"], key=lambda t: t["value"])
    assert answer["best"] == best
    for trial in answer["trials"]:
        run = loaded(Path(trial["run"]))
        assert run.status == "finished"
        assert run.config["x"] == trial["params"]["x"]
        assert list(run.points["val_loss"].items())[-1] == (9, trial["value"])
        assert (run.directory.provenance / "requirements.txt").is_file()
    assert [t.value for t in trials(tmp_path / "runs" / "searched-sweep")] == [
        t["value"] for t in answer["trials"]
    ]
    listed = stoker("runs", "list", "--json").answer["runs"]
    assert len(listed) == 12


def test_the_same_command_goes_on_and_asks_for_as_many_as_are_missing(stoker: Command) -> None:
    first = stoker("sweep", RECIPE, *SPACE, "--trials", "3", "--json").answer
    again = stoker("sweep", RECIPE, *SPACE, "--trials", "5", "--json").answer
    assert brief(again)[:3] == brief(first)
    assert len(again["trials"]) == 5
    whole = stoker("sweep", RECIPE, *SPACE, "--trials", "5", "--name", "whole", "--json").answer
    assert brief(whole) == brief(again)


def test_processes_that_are_used_again_train_the_same(stoker: Command) -> None:
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = (
        "sweep", recipe, "h0=uniform(0, 1)", "steps=20", "precision=fp32", "--metric", "score", "--goal",
        "max", "--sampler", "random", "--trials", "4", "--scheduler", "asha", "--least", "5", "--most", "20",
        "--json",
    )  # fmt: skip
    each, same = stoker(*given), stoker(*given, "--name", "again", "--reuse-processes")
    assert same.code == 0, same.err
    assert brief(each.answer) == brief(same.answer)
    used = [
        {attempt.pid for t in done.answer["trials"] for attempt in loaded(Path(t["run"])).attempts}
        for done in (each, same)
    ]
    assert len(used[0]) > 4
    assert len(used[1]) == 1


@needs_chromium
def test_its_report_draws_what_it_has(stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "sweep", RECIPE, *SPACE, "fails=raise", "--trials", "12", "--scheduler", "asha", "--least", "1",
        "--most", "9", "--name", "asha",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = Path(stoker("report", "asha", "--json").answer["report"])
    with Browser(report, tmp_path / "profile", height=5000) as page:
        page.until("[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn === 'yes')")
        headings = page.run("[...document.querySelectorAll('h2')].map((heading) => heading.textContent)")
        assert not page.errors
    assert {"Best", "History", "Learning curves", "Slices", "Ended early", "Trials", "Failures"} <= {
        *headings
    }
    text = report.read_text(encoding="utf-8")
    assert "RuntimeError: this one cannot be trained" in text
    assert "least 1, most 9, factor 3" in text


def test_a_search_of_which_no_trial_was_trained_to_its_end_says_so(stoker: Command) -> None:
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "--sampler", "random", "--trials", "2")
    asha = (*given, "--name", "early", "--scheduler", "asha", "--least", "1", "--most", "9")
    early = " ".join(stoker(*asha).out.split())
    assert "no trial was trained to its end: the best of 2 trials ended early, at step 1;" in early
    assert "`stoker resume early/trial-0000` trains this one to its end, from its newest checkpoint;" in early
    assert "then run the same search again to count it" in early
    assert stoker("resume", "early/trial-0000").code == 0
    assert "trained to its end" not in stoker(*asha).out
    first, second = stoker(*asha, "--json").answer["trials"]
    assert (first["state"], first["values"][-1]) == ("complete", [9, first["value"]])
    assert (second["state"], second["values"][-1][0]) == ("pruned", 1)
    report = Path(stoker("report", "early", "--json").answer["report"]).read_text(encoding="utf-8")
    assert "1 complete, 1 pruned" in report
    two = stoker("report", "early", "early")
    assert two.code == 2
    assert "stoker runs compare early/trial-0000 early/trial-0000" in two.err


def test_asha_pauses_promotes_and_gives_up(stoker: Command) -> None:
    done = stoker(
        "sweep", RECIPE, "x=uniform(0, 1)", "--trials", "9", "--scheduler", "asha", "--least", "1",
        "--most", "9", "--sampler", "random", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    answer = done.answer
    reached = sorted(t["values"][-1][0] for t in answer["trials"])
    assert reached.count(9) >= 1
    assert reached.count(1) >= 5, "most end at the first rung"
    assert {t["state"] for t in answer["trials"]} == {"complete", "pruned"}
    assert answer["best"]["state"] == "complete"
    ends = {t["state"]: loaded(Path(t["run"])).status for t in answer["trials"]}
    assert ends == {"complete": "finished", "pruned": "stopped"}
    promoted = [loaded(Path(t["run"])) for t in answer["trials"] if t["values"][-1][0] == 9]
    for run in promoted:
        assert [step for step, _ in run.points["val_loss"].items()] == list(range(1, 10))


def test_rungs_and_budget_are_counted_by_epochs(stoker: Command, tmp_path: Path) -> None:
    """An epoch of 64 samples is 16 steps of 4, and 8 of 8."""
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = (
        "sweep", recipe, "batch_size=[4, 8]", "steps=200", "precision=fp32", "--metric", "score", "--goal",
        "max", "--try", "batch_size=4", "--try", "batch_size=8", "--trials", "2", "--scheduler", "asha-stop",
        "--factor", "2", "--least", "1ep", "--most", "3ep", "--json",
    )  # fmt: skip
    done = stoker(*given)
    assert done.code == 0, done.err
    ends = {t["params"]["batch_size"]: (t["state"], t["values"][-1][0]) for t in done.answer["trials"]}
    assert ends[8] == ("pruned", 8), "at the first epoch it has done half as many steps"
    assert ends[4] == ("complete", 200)
    spent = stoker(*given, "--name", "spent", "--budget", "10ep")
    assert spent.code == 0, spent.err
    assert "the time or the budget is used up" in spent.err
    (trial,) = spent.answer["trials"]
    assert 160 <= trial["values"][-1][0] < 200
    assert not spent.answer["over"]
    assert spent.answer["best"] == trial
    refused = stoker(*given, "--name", "other", "--budget", "100")
    assert refused.code == 2
    assert "--budget is in steps, --least and --most in epochs" in refused.err


@pytest.mark.soak(small=False)
def test_rungs_may_be_shares_of_the_data(stoker: Command, start: Start, tmp_path: Path) -> None:
    """Each is a training of its own: on 36 % of the 64 samples, then on all."""
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = (
        "sweep", recipe, "h0=uniform(0, 1)", "epochs=3", "precision=fp32", "pause=0.03", "--metric", "score",
        "--goal", "max", "--sampler", "random", "--trials", "6", "--scheduler", "asha", "--least", "36%",
        "--most", "100%", "--factor", "3", "--json",
    )  # fmt: skip
    done = stoker(*given, "--name", "whole")
    assert done.code == 0, done.err
    reached = [[share for share, _ in trial["values"]] for trial in done.answer["trials"]]
    assert sorted(reached) == [[36]] * 4 + [[36, 100]] * 2
    assert {len(t["values"]): t["state"] for t in done.answer["trials"]} == {1: "pruned", 2: "complete"}
    for trial in done.answer["trials"]:
        run = loaded(Path(trial["run"]))
        share = trial["values"][-1][0] / 100
        assert run.config["data_share"] == pytest.approx(share)
        seen = [int(value) for value in run.points["first"].y]
        assert len(set(seen)) <= round(64 * share)
        assert run.last("score") == trial["values"][-1][1]
    process = start(*given, "--name", "parts")
    _wait_until_it_searches(process, tmp_path / "runs" / "parts", "trial-0002-on-36")
    process.kill()
    process.wait()
    assert brief(stoker(*given, "--name", "parts").answer) == brief(done.answer)
    refused = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--scheduler", "asha", "--most", "100%")
    assert refused.code == 2
    assert "the recipe has no key data_share" in refused.err


@pytest.mark.parametrize("streaming", ["true", "[true, false]"])
def test_shares_that_a_recipe_refuses_are_refused_before_anything_is_started(
    streaming: str, stoker: Command, tmp_path: Path
) -> None:
    shares = ("--strategy", "staged", "--least", "10%", "--most", "100%", "--trials", "4")
    searched = ("sweep", "llm", "lora.rank=int(4, 8)", "quantisation=[none, nf4]", f"streaming={streaming}")
    refused = stoker(*searched, *shares)
    assert refused.code == 2
    assert "data_share=0.1" in refused.err
    assert "omit streaming=true" in refused.err
    assert not (tmp_path / "runs").exists()


def test_a_loop_that_counts_no_epochs_says_so(stoker: Command) -> None:
    done = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1", "--budget", "5ep", "--json")
    assert done.answer["trials"][0]["state"] == "failed"
    assert (
        "trials are compared by epochs, and this loop does not report how many"
        in done.answer["trials"][0]["error"]
    )


@pytest.mark.soak(small=False)
def test_hours_of_all_ranks_are_a_budget(stoker: Command) -> None:
    """One trial after another, so that they take as long."""
    given = (
        "sweep", RECIPE, "x=uniform(0, 1)", "pause=0.05", "--trials", "1000", "--budget", "0.002gpuh",
        "--json",
    )  # fmt: skip
    begun = time.monotonic()
    done = stoker(*given)
    assert done.code == 0, done.err
    assert time.monotonic() - begun >= 7.2
    assert len(done.answer["trials"]) < 1000
    more = stoker(*given)
    assert len(more.answer["trials"]) <= len(done.answer["trials"]) + 1, "what was spent before counts"


def test_of_several_metrics_it_finds_the_front(stoker: Command, tmp_path: Path) -> None:
    """Near 0.3 the loss is least, and the cost is x: none above 0.3 is worth it."""
    given = (
        "sweep", RECIPE, "x=[0.0, 0.1, 0.2, 0.3, 0.5]", "--sampler", "grid", "--metric", "val_loss",
        "--metric", "cost", "--goal", "min", "--goal", "min", "--json",
    )  # fmt: skip
    done = stoker(*given)
    assert done.code == 0, done.err
    answer = done.answer
    x = {trial["number"]: trial["params"]["x"] for trial in answer["trials"]}
    assert sorted(x[number] for number in answer["front"]) == [0.0, 0.1, 0.2, 0.3]
    assert answer["best"]["params"]["x"] == 0.3
    assert all(t["objectives"]["cost"] == t["params"]["x"] for t in answer["trials"])
    again = stoker(*given)
    assert again.answer == answer
    early = stoker(*given, "--name", "early", "--scheduler", "asha", "--least", "1", "--most", "9")
    assert early.code == 0, early.err
    assert "pruned" in {t["state"] for t in early.answer["trials"]}
    report = Path(stoker("report", "searched-sweep", "--json").answer["report"]).read_text(encoding="utf-8")
    assert "Pareto front" in report
    assert "the smallest val_loss and the smallest cost of searched.py:train, with " in report
    assert "none, seed" not in report
    refused = stoker(*given, "--name", "cmaes", "--sampler", "cmaes")
    assert refused.code == 2
    assert "optimises one metric" in refused.err
    lacking = stoker(*given, "--name", "lacking", "--metric", "size", "--goal", "min")
    assert lacking.code == 1
    assert "the recipe never logs size" in lacking.err


def test_stages_end_with_whole_trainings_of_the_best(stoker: Command, tmp_path: Path) -> None:
    given = (
        "sweep", RECIPE, "x=uniform(0, 1)", "--strategy", "staged", "--least", "1", "--most", "9",
        "--trials", "24", "--json",
    )  # fmt: skip
    done = stoker(*given)
    assert done.code == 0, done.err
    trials = done.answer["trials"]
    complete = [t for t in trials if t["state"] == "complete"]
    assert len(complete) == 1, "one in twenty"
    assert {t["values"][-1][0] for t in trials} <= {1, 3, 9}
    assert done.answer["best"] == complete[0]
    first, second = (
        [abs(t["params"]["x"] - 0.3) for t in trials[:12]],
        [abs(t["params"]["x"] - 0.3) for t in trials[12:]],
    )
    assert sorted(second)[len(second) // 2] < sorted(first)[len(first) // 2]
    refused = stoker(*given, "--name", "two", "--sampler", "tpe")
    assert refused.code == 2


@pytest.mark.parametrize("how", ["raise", "nan", "exit"])
def test_a_trial_that_fails_is_one_failed_trial(how: str, stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "sweep", RECIPE, "x=[0.1, 0.9, 0.2]", f"fails={how}", "--sampler", "grid", "--trials", "3", "--json"
    )
    assert done.code == 0, done.err
    failed = [t for t in done.answer["trials"] if t["state"] == "failed"]
    assert [t["params"]["x"] for t in failed] == [0.9]
    said = {
        "raise": "this one cannot be trained",
        "nan": "val_loss is nan at step 3",
        "exit": "exited with code 3",
    }
    assert said[how] in failed[0]["error"]
    assert done.answer["best"]["params"]["x"] == 0.2
    assert sorted(t.state.name for t in trials(tmp_path / "runs" / "searched-sweep")) == [
        "COMPLETE", "COMPLETE", "FAIL",
    ]  # fmt: skip


def test_too_many_failures_end_it(stoker: Command) -> None:
    given = (
        "sweep", RECIPE, "x=uniform(0.6, 1)", "fails=raise", "--trials", "9", "--max-failures", "1", "--json"
    )  # fmt: skip
    for _ in range(2):  # also when it is started again
        done = stoker(*given)
        assert done.code == 1
        assert "2 trials failed, more than --max-failures 1" in done.err
        assert "this one cannot be trained" in done.answer["error"]
        assert [t["state"] for t in done.answer["trials"]] == ["failed", "failed"]


def test_a_search_whose_first_trials_are_refused_alike_ends(stoker: Command) -> None:
    given = ("sweep", RECIPE, "x=uniform(0.6, 1)", "fails=refuse", "--trials", "9", "--json")
    done = stoker(*given)
    assert done.code == 1
    assert "5 trials were refused with the same error: this cannot be trained on" in done.err
    assert [t["state"] for t in done.answer["trials"]] == ["failed"] * 5
    assert len(stoker(*given).answer["trials"]) == 9  # the same command goes on


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("data=none.jsonl",), "data file none.jsonl does not exist"),
        (("model=here", "sequence_length=300"), "sequence_length=300 is more than the 256 positions of here"),
        (("lora.rank=[2, 4]", "lora.targets=q_prj"), "has no layer 'q_prj'; did you mean 'q_proj'?"),
    ],
)
def test_what_each_trial_would_be_refused_for_is_said_before_the_first(
    given: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    families.save(tmp_path / "here", "llama")
    done = stoker("sweep", "llm", "lr=log(1e-4, 1e-3)", *given, "--trials", "6")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "runs").exists()


def test_a_search_of_which_some_trials_can_begin_is_searched(stoker: Command, tmp_path: Path) -> None:
    """And those that cannot are failed trials."""
    (tmp_path / "picky.py").write_text(
        "from dataclasses import dataclass\nimport stoker\n"
        "@dataclass(frozen=True)\nclass Config:\n    x: float = 0.0\n"
        "def check_launch(config):\n"
        "    if config.x > 1:\n        raise stoker.BadInput('x is too large')\n"
        "def train(run, config: Config):\n    run.log(val_loss=config.x)\n"
    )
    done = stoker("sweep", "picky.py", "x=[0.5, 2, 3]", "--sampler", "grid", "--json")
    assert [t["state"] for t in done.answer["trials"]].count("failed") == 2, done.err
    refused = stoker("sweep", "picky.py", "x=[2, 3]", "--sampler", "grid", "--name", "b")
    assert (refused.code, refused.err) == (2, "stoker: error: x is too large\n")


def test_a_search_in_which_a_trial_was_not_refused_goes_on(stoker: Command) -> None:
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "--try", "x=0.1", "fails=refuse", "--trials", "12", "--json")
    done = stoker(*given)
    assert (done.code, len(done.answer["trials"])) == (0, 12), done.err
    assert len([t for t in done.answer["trials"] if t["state"] == "failed"]) >= 5


PLAIN = (
    "import os, pathlib, stoker",
    "from dataclasses import dataclass",
    "@dataclass(frozen=True)",
    "class Config:",
    "    x: float = 0.0",
)


def test_a_trial_that_dies_at_the_same_step_each_time_is_given_up(
    stoker: Command, write_file: Callable[[str, Sequence[str]], Path]
) -> None:
    recipe = write_file("dies.py", (
        *PLAIN,
        "def train(run: stoker.Run, config: Config):",
        "    for step in (1, 2, 3):",
        "        run.log(val_loss=1 / step, step=step)",
        "    os.kill(os.getpid(), 11)",
    ))  # fmt: skip
    done = stoker("sweep", str(recipe), "x=uniform(0, 1)", "--trials", "1", "--json")
    assert done.code == 1, "none of its trials came to anything"
    assert "every trial failed, the first with: its process was killed by SIGSEGV" in done.err
    (trial,) = done.answer["trials"]
    assert trial["state"] == "failed"
    assert "killed by SIGSEGV" in trial["error"]
    assert len(loaded(Path(trial["run"])).attempts) == 4


def test_a_trial_that_is_killed_after_its_last_value_is_complete(
    stoker: Command, write_file: Callable[[str, Sequence[str]], Path]
) -> None:
    recipe = write_file("late.py", (
        *PLAIN,
        "def train(run: stoker.Run, config: Config):",
        "    for step in range(run.step + 1, 4):",
        "        run.log(val_loss=1 / step, cost=config.x)",
        "    mark = pathlib.Path('killed')",
        "    if not mark.exists():",
        "        mark.touch()",
        "        os.kill(os.getpid(), 9)",
    ))  # fmt: skip
    done = stoker(
        "sweep", str(recipe), "x=[0.5]", "--sampler", "grid", "--metric", "val_loss", "--metric", "cost",
        "--goal", "min", "--goal", "min", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    (trial,) = done.answer["trials"]
    assert (trial["state"], trial["objectives"]) == ("complete", {"val_loss": 1 / 3, "cost": 0.5})


def test_what_was_refused_leaves_nothing_and_changed_code_is_said_and_kept(
    stoker: Command, write_file: Callable[[str, Sequence[str]], Path], tmp_path: Path
) -> None:
    for command in ("init -q", "config user.email a@b", "config user.name a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    recipe = write_file("loss.py", (
        *PLAIN, "def train(run: stoker.Run, config: Config):", "    run.log(val_loss=config.x)",
    ))  # fmt: skip

    def commit() -> None:
        subprocess.run(["git", "add", "loss.py"], cwd=tmp_path, check=True)
        subprocess.run(["git", "commit", "-qm", "a"], cwd=tmp_path, check=True)

    commit()
    given = ("sweep", str(recipe), "x=uniform(0, 1)", "--name", "s")
    assert stoker(*given, "--sampler", "tpee").code == 2
    assert stoker(*given, "--trials", "1").code == 0
    recipe.write_text(recipe.read_text().replace("val_loss=config.x", "val_loss=2 * config.x"))
    commit()
    done = stoker(*given, "--trials", "2")
    assert done.code == 0, done.err
    assert "the code has changed since the search started" in done.err
    first, second = (tmp_path / "runs" / "s" / f"trial-000{n}" / "provenance" / "code.json" for n in (0, 1))
    assert json.loads(first.read_text())["commit"] != json.loads(second.read_text())["commit"]
    assert "has changed" not in stoker(*given, "--trials", "3").err


def test_a_grid_has_each_point_once_and_qmc_draws_what_is_conditional(stoker: Command) -> None:
    space = ("kind=[near, far]", "steps=[1, 2, 3] if kind == far")
    grid = stoker("sweep", RECIPE, *space, "--sampler", "grid", "--json").answer
    points = [tuple(t["params"].items()) for t in grid["trials"]]
    assert len(points) == len(set(points)) == 4
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "kind=[near, far]", "steps=int(1, 9) if kind == far")
    done = stoker(*given, "--sampler", "qmc", "--trials", "12", "--name", "qmc", "--json")
    assert len({t["params"]["steps"] for t in done.answer["trials"] if "steps" in t["params"]}) > 1
    assert "[W" not in done.err


WAYS = [
    ("--scheduler", "asha", "--least", "1", "--most", "9"),
    ("--sampler", "random", "--reuse-processes"),  # the next trial is in a process's hands
]


@pytest.mark.soak
@pytest.mark.parametrize("how", WAYS if SOAK else WAYS[:1])
def test_killed_at_random_moments_it_ends_as_it_would_have(
    how: tuple[str, ...], start: Start, stoker: Command, tmp_path: Path
) -> None:
    """The controller or a trial, by SIGKILL; one at a time, so that the order is the same."""
    go = tmp_path / "go"
    given = ("sweep", RECIPE, *SPACE, "pause=0.25", f"until={go}", "--trials", "8", *how, "--json")
    go.touch()
    whole = stoker(*given, "--name", "whole")
    assert whole.code == 0, whole.err
    go.unlink()
    draws = random.Random(0)
    process, kills, controllers, in_a_row = start(*given, "--name", "parts"), 0, 0, 0
    while kills < _KILLS:
        _wait_until_it_searches(process, tmp_path / "runs" / "parts")
        time.sleep(draws.uniform(0.0, 0.4))
        victim = _victim(process, draws, in_a_row)
        if victim is None:  # it came to its end before: how far it is depends on the machine
            break
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        kills, in_a_row = kills + 1, in_a_row + 1
        if victim.pid == process.pid:
            process.wait()
            controllers, in_a_row = controllers + 1, 0
            process = start(*given, "--name", "parts")
    go.touch()
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err.decode()
    assert 0 < controllers < kills >= _KILLS // 2, err.decode()
    answer = json.loads(out.decode().strip().splitlines()[-1])
    assert brief(answer) == brief(whole.answer)
    states = [t.state for t in trials(tmp_path / "runs" / "parts")]
    assert all(state.is_finished() for state in states)


def _wait_until_it_searches(process: subprocess.Popen[bytes], sweep: Path, trial: str = "trial-0000") -> None:
    until((sweep / trial).exists, process)


def _victim(process: subprocess.Popen[bytes], draws: random.Random, before: int) -> psutil.Process | None:
    """The controller, or, once it has one, one of its trials.

    One whose process is killed a fourth time without progress has failed: on a busy machine it makes none.

    Args:
        before: processes of trials killed since the controller was.
    """
    of_a_trial = draws.random() < 0.5 and before < 3
    while of_a_trial and process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one has just ended, of a trial or of none
            children = psutil.Process(process.pid).children(recursive=True)
            known = [child for child in children if child.ppid() != process.pid]
            if known:
                return known[0]
        time.sleep(0.01)
    return psutil.Process(process.pid) if process.poll() is None else None


_TOLD_AT_ITS_END = """
import os
from stoker.tracking.shipping import SweepShipping

def finish(shipping, finished=SweepShipping.finish):
    os.kill(os.getpid(), {number})
    finished(shipping)

SweepShipping.finish = finish
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 130)])
def test_told_to_stop_it_goes_on_later(
    number: signal.Signals, code: int, start: Start, stoker: Command, tmp_path: Path
) -> None:
    """Told twice at once, as a shell and the kernel do when a terminal is closed, and a scheduler may.

    And once more when the search has ended, but not yet the command.
    """
    go = tmp_path / "go"
    given = ("sweep", RECIPE, *SPACE, "pause=1", f"until={go}", "--trials", "2", "--json")
    process = start(*given, first=_TOLD_AT_ITS_END.format(number=int(number)))
    _wait_until_it_searches(process, tmp_path / "runs" / "searched-sweep")
    time.sleep(0.5)
    os.killpg(process.pid, number)
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == code, err.decode()
    go.touch()
    done = stoker(*given)
    assert done.code == 0, done.err
    assert [t["state"] for t in done.answer["trials"]] == ["complete", "complete"]


def test_after_its_time_it_ends_with_its_best(stoker: Command) -> None:
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "pause=0.05", "--json")
    first = stoker(*given, "--trials", "1")
    assert first.code == 0, first.err
    begun = time.monotonic()
    done = stoker(*given, "--trials", "1000", "--max-time", "8s")
    assert done.code == 0, done.err
    assert time.monotonic() - begun >= 8
    assert 1 <= len(done.answer["trials"]) < 1000
    assert done.answer["best"] is not None
    assert not done.answer["over"]


@pytest.mark.soak(small=False)
def test_it_learns_from_an_earlier_one_and_tries_what_it_is_told(stoker: Command) -> None:
    first = stoker("sweep", RECIPE, *SPACE, "--trials", "12", "--name", "first", "--json")
    assert first.code == 0, first.err
    given = ("sweep", RECIPE, *SPACE, "--trials", "3", "--try", "x=0.25,kind=near", "--json")
    done = stoker(*given, "--name", "second", "--warm-start", "first")
    assert done.code == 0, done.err
    assert "learns from 12 trials of first" in done.err
    assert len(done.answer["trials"]) == 3
    assert done.answer["trials"][0]["params"] == {"x": 0.25, "kind": "near"}
    cold = stoker(*given, "--name", "cold").answer
    assert cold["trials"][0]["params"] == {"x": 0.25, "kind": "near"}
    assert cold["trials"][1]["params"] != done.answer["trials"][1]["params"]
    refused = stoker("sweep", RECIPE, "kind=[near, far]", "--trials", "1", "--warm-start", "third")
    assert refused.code == 2
    assert "there is no sweep" in refused.err
    refused = stoker("sweep", RECIPE, "kind=[far]", "--trials", "1", "--name", "b", "--warm-start", "first")
    assert refused.code == 2
    assert "kind: [near, far] there, [far] here" in refused.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("y=uniform(0, 1)",), "y"),
        (("x=uniform(1, 0)",), "uniform(1, 0)"),
        (("x=log(0, 1)",), "log"),
        (("x=uniform(0, 1)", "--scheduler", "asha", "--least", "1"), "most"),
        (("x=uniform(0, 1)", "--sampler", "tpee"), "did you mean 'tpe'"),
        (("x=uniform(0, 1)", "--metric", "score"), "--goal min or --goal max"),
        (("x=uniform(0, 1)", "--scheduler", "asha", "--most", "10min"), "not by time"),
        (("x=uniform(0, 1)", "--scheduler", "asha", "--least", "1", "--most", "2ep"), "different units"),
        (("x=uniform(0, 1)", "--budget", "40parsecs"), "give hours over all ranks, such as 40gpuh"),
        (("x=uniform(0, 1)", "--strategy", "stages"), "the only strategy is staged"),
        (("x=uniform(0, 1)", "--most", "9"), "for a --scheduler that ends trials early"),
        (("x=uniform(0, 1)", "--name", "../up"), "is not a valid folder name"),
        (("x=uniform(0, 1)", "--trials", "1", "--try", "x=0.1", "--try", "x=0.2"), "2 --try for 1 trial:"),
        (("x=[0, 1]", "--sampler", "grid", "--try", "x=0"), "the grid sampler tries every value"),
        (("x=uniform(0, 1)", "--runs", "/proc/x"), "choose another folder"),
    ],
)
def test_what_cannot_be_searched_starts_nothing(
    given: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    done = stoker("sweep", RECIPE, *given)
    assert done.code == 2, done.err
    assert said in done.err
    assert not list(tmp_path.glob("runs/*/trial-*"))


def test_a_metric_that_is_never_logged_ends_it_after_the_first_trial(stoker: Command) -> None:
    done = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--metric", "val_los", "--trials", "5", "--goal", "min")
    assert done.code == 1
    assert "the recipe never logs val_los: it logs cost, loss, val_loss" in done.err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--max-time", "4x"), "--max-time '4x' is not a length of time"),
        (("--budget", "1..2h"), "--budget 1..2h"),
        (("--budget", "0h"), "must be a finite number of hours above 0"),
        (("--budget", "1e400h"), "must be a finite number of hours above 0"),
        (("--sampler", "staged"), "give --strategy staged"),
        (("--scheduler", "staged"), "give --strategy staged"),
        (("--scheduler", "pb2"), "--scheduler pb2 needs --least"),
        (("--quantile", "0.5"), "are for --scheduler pbt and pb2"),
        (("--factor", "4"), "--factor is for --scheduler asha, asha-stop, hyperband and --strategy staged"),
        (("--scheduler", "pbt", "--least", "2", "--perturb", "2"), "--perturb 2: give two factors"),
        (("--scheduler", "pbt", "--least", "2", "--resample", "2"), "--resample 2: must be a probability"),
        (("--study", "a"), "a study in --storage; also give --storage"),
        (("--storage", "postgresql+psycopg2://u:p@127.0.0.1:9/x"), "cannot be used"),
        (
            ("--storage", "postgres://u:p@127.0.0.1:9/x"),
            "postgresql+psycopg2://u:[REDACTED]@127.0.0.1:9/x cannot be",
        ),
        (
            ("--storage", "postgres://127.0.0.1:9/x?user=u&password=swordfish"),
            "postgresql+psycopg2://127.0.0.1:9/x?user=u&password=[REDACTED] cannot be",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_bad_input_and_starts_nothing(
    asked: tuple[str, ...], said: str, stoker: Command, tmp_path: Path
) -> None:
    refused = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--name", "a", *asked)
    assert refused.code == 2, refused.err
    assert said in refused.err
    assert "Traceback" not in refused.err
    assert "swordfish" not in refused.out + refused.err
    assert not (tmp_path / "runs" / "a").exists()


def test_another_space_in_the_same_folder_is_refused(stoker: Command, tmp_path: Path) -> None:
    assert stoker("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1").code == 0
    done = stoker("sweep", RECIPE, "x=uniform(0, 2)", "--trials", "1")
    assert done.code == 2
    assert "x: uniform(0" in done.err
    assert "--new" in done.err
    assert stoker("sweep", RECIPE, "x=uniform(0, 2)", "--trials", "1", "--new").code == 0
    assert (tmp_path / "runs" / "searched-sweep-2" / "trial-0000").is_dir()


PBT = (
    "(h0, h1)=[(1.0, 0.0), (0.0, 1.0)]", "precision=fp32", "--metric", "score", "--goal", "max",
    "--sampler", "random", "--trials", "4", "--scheduler", "pbt", "--least", "5", "--most", "80", "--json",
)  # fmt: skip


def test_a_population_reaches_what_neither_fixed_setting_does(stoker: Command, tmp_path: Path) -> None:
    """A trial that is forked has its donor's weights, optimizer and place in the data."""
    recipe = str(Path(__file__).parent / "quadratic.py")
    alone = stoker("train", recipe, "precision=fp32", "--name", "alone", "--json").answer
    assert alone["metrics"]["score"] < 0.6
    done = stoker("sweep", recipe, *PBT)
    assert done.code == 0, done.err
    assert done.answer["best"]["value"] > 1.1
    forked = [t for t in done.answer["trials"] if t["parent"] is not None]
    assert forked
    whole = dict(loaded(tmp_path / "runs" / "quadratic" / "alone").points["first"].items())
    for trial in forked:
        donor = done.answer["trials"][trial["parent"]]
        assert trial["params"] != donor["params"]
        run = loaded(Path(trial["run"]))
        own = dict(run.points["score"].items())
        begun = min(own)
        assert begun > 1
        assert trial["values"][: begun - 1] == donor["values"][: begun - 1]
        assert own[begun] == pytest.approx(trial["values"][begun - 2][1], abs=0.1), "one continuous curve"
        assert dict(run.points["first"].items()) == {n: v for n, v in whole.items() if n in own}


@pytest.mark.soak(small=False)
def test_how_a_population_explores_can_be_set(stoker: Command) -> None:
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = ("h0=uniform(0, 100)", "h1=1.0", "hangs=1000", "precision=fp32", "--metric", "score")
    pbt = ("--goal", "max", "--sampler", "random", "--trials", "2", "--scheduler", "pbt", "--least", "20")
    done = stoker(
        "sweep", recipe, *given, *pbt, "--most", "80", "--try", "h0=1", "--try", "h0=2", "--json",
        "--quantile", "0.5", "--resample", "0", "--perturb", "0.5,4",
    )  # fmt: skip
    assert done.code == 0, done.err
    trials = done.answer["trials"]
    forked = [trial for trial in trials if trial["parent"] is not None]
    assert forked, "half of a population of two is replaced"
    for trial in forked:
        assert trial["params"]["h0"] / trials[trial["parent"]]["params"]["h0"] in (0.5, 4)


@pytest.mark.soak(small=False)
def test_a_population_learns_from_what_values_have_gained(stoker: Command) -> None:
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = ("h0=uniform(0, 1)", "h1=uniform(0, 1)", "precision=fp32", "--metric", "score", "--goal", "max")
    done = stoker(
        "sweep", recipe, *given, "--sampler", "random", "--trials", "4", "--scheduler", "pb2",
        "--least", "10", "--most", "80", "--json", "--resample", "0", "--perturb", "1,1",
    )  # fmt: skip
    assert done.code == 0, done.err
    trials = done.answer["trials"]
    assert done.answer["best"]["value"] > 1.1
    forked = [trial for trial in trials if trial["parent"] is not None]
    assert forked[-1]["params"] != trials[forked[-1]["parent"]]["params"], "else it has its donor's values"
    assert done.answer["over"]


@pytest.mark.soak(small=False)
def test_a_trial_of_a_plain_loop_that_hangs_is_one_failed_trial(stoker: Command) -> None:
    given = ("sweep", RECIPE, "x=[0.1, 0.9]", "fails=hang", "hang_limit=8s", "--sampler", "grid", "--json")
    done = stoker(*given)
    assert done.code == 0, done.err
    assert {t["params"]["x"]: t["state"] for t in done.answer["trials"]} == {0.1: "complete", 0.9: "failed"}
    (failed,) = [t for t in done.answer["trials"] if t["state"] == "failed"]
    assert "it hangs: no progress after step 2" in failed["error"]
    assert "searched.py" in next(Path(failed["run"]).glob("logs/stacks*/rank-0.txt")).read_text()


def test_a_trial_that_hangs_is_one_failed_trial(stoker: Command) -> None:
    recipe = str(Path(__file__).parent / "quadratic.py")
    done = stoker(
        "sweep", recipe, "h0=[0.1, 1.0]", "hangs=1.0", "hang_limit=8s", "precision=fp32", "--metric", "score",
        "--goal", "max", "--sampler", "grid", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {t["params"]["h0"]: t["state"] for t in done.answer["trials"]} == {0.1: "complete", 1.0: "failed"}
    (failed,) = [t for t in done.answer["trials"] if t["state"] == "failed"]
    assert "it hangs: no progress after step 19" in failed["error"]
    assert len(loaded(Path(failed["run"])).attempts) == 1


def test_trials_of_two_ranks_end_early_together(stoker: Command, tmp_path: Path) -> None:
    recipe = str(Path(__file__).parent / "quadratic.py")
    done = stoker(
        "sweep", recipe, "h0=[0.1, 1.0, 0.2, 0.3]", "h1=1.0", "precision=fp32", "--metric", "score",
        "--goal", "max", "--sampler", "grid", "--trials", "4", "--nproc", "2", "--scheduler", "asha-stop",
        "--factor", "2", "--least", "5", "--most", "80", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    states = {t["params"]["h0"]: t["state"] for t in done.answer["trials"]}
    assert states[1.0] == "complete"
    assert "pruned" in states.values()
    for trial in done.answer["trials"]:
        run = loaded(Path(trial["run"]))
        assert run.attempts[-1].world == 2
        assert run.status == {"complete": "finished", "pruned": "stopped"}[trial["state"]]
        if trial["state"] == "pruned":
            assert trial["values"][-1][0] < 80


_PATIENT = f"""
from stoker.cli import searching

searching._SINKS_TIMEOUT = {LONG}
"""
"""Executed first by a command that is to wait until the trackers have everything."""


@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy, by MLflow
def test_mlflow_has_the_sweep_as_the_parent_of_its_trials(stoker: Command, tmp_path: Path) -> None:
    """Shipped by one process for all of them; and those that are added later."""
    from mlflow import MlflowClient
    from stoker.tracking import store

    for trials in ("2", "4"):
        done = stoker(
            "sweep", RECIPE, *SPACE, "--trials", trials, "--name", "s", "--parallel", "2", "--json",
            env={"STOKER_SINKS": "mlflow"}, first=_PATIENT,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "not everything is shipped" not in done.err
        client = MlflowClient(store.embedded_uri(tmp_path / "runs"))
        experiment = client.get_experiment_by_name("s")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in runs if "stoker.sweep" in run.data.tags]
        assert parent.data.params["space.x"] == "uniform(0.0, 1.0)"
        best = done.answer["best"]
        assert parent.data.tags["stoker.best"] == Path(best["run"]).name
        assert parent.data.metrics == {"val_loss": best["value"]}
        children = [run for run in runs if run is not parent]
        assert len(children) == int(trials)
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in children:
            points = client.get_metric_history(run.info.run_id, "val_loss")
            assert [point.step for point in points] == list(range(1, 10))


def test_a_search_whose_process_that_ships_was_killed_is_shipped_whole(
    stoker: Command, tmp_path: Path
) -> None:
    (tmp_path / "killing.py").write_text(
        "import json, os, signal, time, stoker\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Config:\n    x: float = 0.0\n"
        "def train(run, config: Config):\n"
        "    ledger = run.directory.sinks / 'tensorboard.json'\n"
        "    run.log(val_loss=config.x, step=1)\n"
        "    while not ledger.exists():\n        time.sleep(0.1)\n"
        "    os.kill(json.loads(ledger.read_text())['pid'], signal.SIGKILL)\n"
        "    run.log(val_loss=config.x, step=2)\n"
    )
    sinks = {"STOKER_SINKS": "tensorboard"}
    given = ("sweep", "killing.py", "x=[0.5]", "--sampler", "grid", "--name", "s")
    done = stoker(*given, env=sinks, first=_PATIENT)
    assert done.code == 0, done.err
    assert "not everything is shipped" not in done.err
    (ledger,) = (tmp_path / "runs" / "s").glob("*/sinks/tensorboard.json")
    assert json.loads(ledger.read_text())["concluded"]


@pytest.mark.soak(small=False)
@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy, by MLflow
def test_mlflow_has_a_parent_for_each_search_of_one_name(stoker: Command, tmp_path: Path) -> None:
    """Two searches of one server, or one whose folder was deleted and another in its place."""
    from mlflow import MlflowClient
    from stoker.tracking import store

    for space in ("x=uniform(0, 1)", "kind=[near, far]"):
        shutil.rmtree(tmp_path / "runs" / "s", ignore_errors=True)
        given = ("sweep", RECIPE, space, "--trials", "2", "--name", "s", "--sampler", "random")
        done = stoker(*given, env={"STOKER_SINKS": "mlflow"}, first=_PATIENT)
        assert done.code == 0, done.err
    client = MlflowClient(store.embedded_uri(tmp_path / "runs"))
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run.data.params for run in runs if "stoker.sweep" in run.data.tags}
    assert sorted("space.x" in params for params in parents.values()) == [False, True]
    children = [run.data.tags["mlflow.parentRunId"] for run in runs if run.info.run_id not in parents]
    assert sorted(children) == sorted(2 * [*parents])


@pytest.mark.soak
def test_killed_at_random_moments_no_trial_is_lost(start: Start, tmp_path: Path) -> None:
    """Two trials at a time, with a Trainer and checkpoints."""
    recipe = str(Path(__file__).parent / "quadratic.py")
    given = (
        "sweep", recipe, "h0=uniform(0, 1)", "h1=uniform(0, 1)", "precision=fp32", "pause=0.02",
        "checkpoint_every=10", "--metric", "score", "--goal", "max", "--trials", "6", "--parallel", "2",
        "--name", "s", "--json",
    )  # fmt: skip
    draws = random.Random(1)
    process, kills, in_a_row = start(*given), 0, 0
    while kills < _KILLS:
        _wait_until_it_searches(process, tmp_path / "runs" / "s")
        time.sleep(draws.uniform(0.1, 0.8))
        victim = _victim(process, draws, in_a_row)
        if victim is None:
            break
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        kills, in_a_row = kills + 1, in_a_row + 1
        if victim.pid == process.pid:
            process.wait()
            process, in_a_row = start(*given), 0
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err.decode()
    answer = json.loads(out.decode().strip().splitlines()[-1])
    assert [t["state"] for t in answer["trials"]] == ["complete"] * 6
    for trial in answer["trials"]:
        run = loaded(Path(trial["run"]))
        assert [a.status for a in run.attempts].count("finished") == 1
        assert list(run.points["score"].items())[-1][0] == 80
        assert [step for step, _ in trial["values"]] == list(range(1, 81))
    assert all(trial.state.is_finished() for trial in trials(tmp_path / "runs" / "s"))
