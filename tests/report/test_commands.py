"""The commands that train a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stoker.report import commands
from stoker.reproduce import stretch
from stoker.run.directory import RunDirectory
from stoker.run.state import AttemptView, RunView

from support import series

LLM = {"recipe": {"reference": "llm"}, "command": ["/bin/stoker", "train", "llm", "lr=0.5", "--name", "a"]}


def _view(
    *attempts: dict[str, Any], record: dict[str, Any] = LLM, steps: int = 30, path: Path = Path("runs/llm/a")
) -> RunView:
    made = [AttemptView(n, float(n), began=float(n), **given) for n, given in enumerate(attempts, start=1)]
    known = {"config": {"lr": 0.5, "epochs": 2, "rank": 8}, "sources": {"lr": "command line"}, **record}
    points = series(loss=dict.fromkeys(range(1, steps + 1), 1.0))
    return RunView(RunDirectory(path), known, made, points)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/bin/stoker", "train", "llm", "prompts=[a b]"], ["stoker train llm 'prompts=[a b]'"]),
        (["/lib/stoker/__main__.py", "train", "llm"], ["stoker train llm"]),
        (["own.py", "lr=1"], ["python own.py lr=1"]),
        ([], []),
    ],
)
def test_the_command_can_be_typed_again(argv: list[str], expected: list[str]) -> None:
    assert commands.of(_view(record={"command": argv})) == expected


def test_elsewhere_a_run_has_its_values_and_nothing_of_its_place() -> None:
    typed = ["stoker", "train", "llm", "--config", "my.yml", "--name", "a", "--runs=/mine", "--on", "slurm"]
    view = _view({"world": 2}, record={**LLM, "command": typed, "sources": {"lr": "my.yml"}})
    assert commands.of(view, elsewhere=True) == ["stoker train llm lr=0.5 --nproc 2"]
    assert commands.of(view) == [f"stoker {' '.join(typed[1:])}"]
    module = _view({}, record={"command": ["/mine/pack/fit.py", "lr=1"], "module": "pack.fit"})
    assert commands.of(module) == ["python -m pack.fit lr=1"]
    own = _view({}, record={"command": ["own.py", "--name", "a"]})
    assert commands.of(own, elsewhere=True) == ["python own.py --name a"], "it is an option of the script's"


def test_a_run_that_was_continued_with_changes_is_that_of_several_commands() -> None:
    longer = {"resumed_from": 18, "drift": {"epochs": [2, 4]}}
    split = {"resumed_from": 20, "drift": {"epochs": [2, 4], "rank": [8, None]}, "world": 2,
             "code": {"model.py": "1"}}  # fmt: skip
    view = _view({}, {"resumed_from": 10}, longer, split)
    assert commands.of(view) == [
        "stoker train llm lr=0.5 --name a  # up to step 18",
        "stoker resume a epochs=4  # from step 19 on",
        "stoker resume a rank=none --nproc 2  # from step 21 on, other code: model.py",
    ]
    assert commands.of(view, 20, elsewhere=True) == [
        "stoker train llm lr=0.5 --name a-again  # up to step 18",
        "stoker resume a-again epochs=4  # from step 19 on",
    ]
    assert commands.of(view, 18, elsewhere=True) == ["stoker train llm lr=0.5"]
    own = _view({}, longer, record={"command": ["own.py"]})
    assert commands.of(own) == ["python own.py  # up to step 18", "# from step 19 on, epochs=4"]


def test_a_run_on_several_machines_is_that_of_a_command_on_each() -> None:
    three, two = {"world": 3, "machines": 3}, {"world": 4, "machines": 2}
    view = _view({}, three | {"resumed_from": 10}, two | {"resumed_from": 20}, {"resumed_from": 25})
    assert commands.of(view) == [
        "stoker train llm lr=0.5 --name a  # up to step 10",
        "stoker resume a --nodes 3 --rendezvous HOST:PORT --nproc 1"
        "  # from step 11 on, on each of 3 machines",
        "stoker resume a --nodes 2 --rendezvous HOST:PORT --nproc 2"
        "  # from step 21 on, on each of 2 machines",
        "stoker resume a --nproc 1  # from step 26 on",
    ]
    assert commands.of(_view(two), elsewhere=True) == [
        "stoker train llm lr=0.5 --nodes 2 --rendezvous HOST:PORT --nproc 2 --name a-again"
        "  # on each of 2 machines"
    ]
    uneven = _view({"world": 3, "machines": 2})
    assert commands.of(uneven, elsewhere=True)[0].endswith(
        "--nodes 2 --rendezvous HOST:PORT --name a-again  # on each of 2 machines, 3 ranks together"
    )
    own = _view({}, three | {"resumed_from": 10}, record={"command": ["own.py"]})
    assert commands.of(own)[1] == "# from step 11 on, 3 ranks on 3 machines"
    spread = {"world": 4, "resumed_from": 10}
    assert len(commands.of(_view(two, spread))) == 1, "as many ranks make the same steps"


def test_a_run_that_was_continued_on_another_device_is_that_of_two_commands() -> None:
    gpu, cpu = ({"layout": {"device": name}} for name in ("NVIDIA H200", "cpu"))
    view = _view(gpu, {**gpu, "resumed_from": 10}, {**cpu, "resumed_from": 20})
    assert commands.of(view) == [
        "stoker train llm lr=0.5 --name a  # up to step 20",
        "stoker resume a  # from step 21 on, on another device: cpu",
    ]
    found = stretch.find(view)
    assert (found.until, found.why) == (20, "it resumed on cpu instead of NVIDIA H200")
    for unknown in ((gpu, {"resumed_from": 10}), ({}, {**gpu, "resumed_from": 10})):  # killed at once, say
        assert len(commands.of(_view(*unknown))) == 1
        assert not stretch.find(_view(*unknown)).why
    assert stretch.find(_view({}, {**gpu, "resumed_from": 10}, {**cpu, "resumed_from": 20})).until == 20


def test_what_the_first_command_trained_in_vain_does_not_count() -> None:
    begun_anew = {"drift": {"epochs": [2, 4]}, "world": 2}
    assert commands.of(_view({}, begun_anew)) == ["stoker train llm lr=0.5 epochs=4 --nproc 2"]
    failed = {"resumed_from": 30, "drift": {"lr": [0.5, 1.0]}, "status": "failed"}
    assert commands.of(_view({}, failed)) == ["stoker train llm lr=0.5 --name a"]


def test_a_trial_and_a_run_again_are_trained_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "runs/sw").mkdir(parents=True)
    (tmp_path / "runs/sw/sweep.json").write_text("{}")
    record = {
        "recipe": {"reference": f"{tmp_path}/own.py:train"}, "cwd": str(tmp_path),
        "command": ["/bin/stoker", "sweep", "own.py", "lr=[0.1, 0.5]", "--trials", "4"],
        "config": {"lr": 0.1, "words": ["a", "b"], "key": "[REDACTED]", "seed": 0},
        "sources": dict.fromkeys(("lr", "words", "key"), "command line"),
    }  # fmt: skip
    trial = _view({}, record=record, path=tmp_path / "runs/sw/trial-1")
    expected = ["""stoker train own.py lr=0.1 'words=["a","b"]' key=..."""]
    assert commands.of(trial, elsewhere=True) == expected
    again = record | {"parents": [{"id": "b", "relation": "reproduces"}]}
    assert commands.of(_view({}, record=again, path=tmp_path / "runs/own/b-again")) == expected


def test_a_run_that_began_from_a_checkpoint_of_another_says_so() -> None:
    (only,) = commands.of(_view({"resumed_from": 8}))
    assert only.endswith("--name a  # from the checkpoint of step 8 of another run")


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("llm", "llm"),
        ("/work/own.py:train", "own.py"),
        ("/work/own.py:fit", "own.py:fit"),
        ("/work/pkg.mod:train", "./pkg.mod:train"),
        ("/elsewhere/pkg.mod:train", "/elsewhere/pkg.mod:train"),
    ],
)
def test_a_recipe_is_named_as_the_command_takes_it(reference: str, target: str) -> None:
    record = {"recipe": {"reference": reference}, "cwd": "/work", "sources": {}}
    assert commands.of(_view({}, record=record), elsewhere=True) == [f"stoker train {target}"]
