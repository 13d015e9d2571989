"""A request for a search, checked without starting anything."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from stoker import recipes, signals
from stoker.cli import searching
from stoker.cli.searching import Asked, Prepared
from stoker.errors import BadInput, Stopped
from stoker.tune import record
from stoker.tune.space_reading import parse

RECIPE = Path(__file__).parent / "searched.py"


def _prepared(folder: Path, *given: str, recipe: Path | str = RECIPE, **asked: Any) -> Prepared:
    found = recipes.load(str(recipe))
    return searching.prepare(
        Asked(recipe=found, space=parse(given, found.config), runs=folder, name="s", **asked)
    )


@pytest.mark.parametrize(("trials", "planned"), [(None, 30), (12, 12), (40, 30)])
def test_a_grid_is_tried_whole_unless_fewer_trials_are_asked_for(
    trials: int | None,
    planned: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    points = ("x=uniform(0.1, 1.5, step=0.1)", "kind=[near, far]")
    assert _prepared(tmp_path, *points, sampler="grid", trials=trials).trials == planned
    assert ("12 of the 30 points of the grid" in caplog.text) == (planned == 12)
    assert _prepared(tmp_path, *points, trials=trials).trials == (trials or 20)


def test_without_a_metric_it_is_the_one_that_the_recipe_keeps_its_best_by(tmp_path: Path) -> None:
    (own := tmp_path / "own.py").write_text(RECIPE.read_text() + '\nBEST_METRIC = "val_f1"\n')
    searched = {"image": "lr=log(0.01, 1)", "text": "lr=log(1e-4, 1)", RECIPE: "x=[1, 2]", own: "x=[1, 2]"}
    found = [_prepared(tmp_path, space, recipe=name).objectives for name, space in searched.items()]
    assert [(one.metric, one.goal) for (one,) in found] == [
        ("val_accuracy", "max"), ("val_accuracy", "max"), ("val_loss", "min"), ("val_f1", "max"),
    ]  # fmt: skip


def test_a_recipe_is_the_same_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "mine.py").write_text(RECIPE.read_text())
    (tmp_path / "link").symlink_to(tmp_path / "code")
    made = _prepared(tmp_path, "x=uniform(0, 1)", recipe=tmp_path / "code" / "mine.py")
    made.folder.mkdir()
    record.begin(made.folder, made.record)
    monkeypatch.chdir(tmp_path / "code" / "deep")
    for path in ("../mine.py", "../../link/mine.py"):
        _prepared(tmp_path, "x=uniform(0, 1)", recipe=Path(path))
    (tmp_path / "code" / "deep" / "mine.py").write_text(RECIPE.read_text())
    with pytest.raises(BadInput, match=r"recipe: .*/code/mine.py:train -> .*/deep/mine.py:train"):
        _prepared(tmp_path, "x=uniform(0, 1)", recipe=Path("mine.py"))


def test_a_population_that_is_to_grow_is_told_that_it_is_its_trials(tmp_path: Path) -> None:
    given: dict[str, Any] = {"scheduler": "pbt", "least": "2", "most": "9"}
    made = _prepared(tmp_path, "x=uniform(0, 1)", trials=4, **given)
    made.folder.mkdir()
    record.begin(made.folder, made.record)
    with pytest.raises(
        BadInput, match=r"population 4.* -> .*population 8.*a population is --trials, and stays"
    ):
        _prepared(tmp_path, "x=uniform(0, 1)", trials=8, **given)


def test_a_key_whose_condition_never_holds_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = parse(["x=uniform(0, 1) if kind == far", "kind=near"], recipes.load(str(RECIPE)).config)
    assert not found.parameters
    assert "x is not searched: drawn only if kind == far, and kind is fixed at near" in caplog.text


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Stopped), (signal.SIGUSR1, Stopped), (signal.SIGINT, KeyboardInterrupt)],
)
def test_told_a_second_time_it_ends_at_once_as_its_kind_of_request_does(
    number: signal.Signals, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_ONE", 0.0)
    search, stopped = cast("Any", SimpleNamespace()), []
    search.stop = lambda: stopped.append(1)

    def told() -> None:
        with searching.answering_signals(search):
            signal.raise_signal(signal.SIGTERM)
            assert stopped == [1]
            signal.raise_signal(number)

    with pytest.raises(raised):
        told()
