"""Which steps of a run one training makes again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stoker.errors import BadInput
from stoker.reproduce import stretch
from stoker.run.directory import RunDirectory
from stoker.run.state import AttemptView, RunView

from support import series


def _view(*attempts: dict[str, Any], steps: int = 30, status: str = "finished") -> RunView:
    made = [AttemptView(n, float(n), began=float(n), **given) for n, given in enumerate(attempts, start=1)]
    made[-1].ended, made[-1].status = 9.0, status
    points = series(loss=dict.fromkeys(range(1, steps + 1), 1.0)) if steps else {}
    return RunView(RunDirectory(Path("/runs/a/b")), {"config": {"lr": 1.0}}, made, points)


def _said(found: stretch.Stretch) -> tuple[int, int | None, dict[str, Any], int]:
    return found.after, found.until, dict(found.config), found.world


def test_a_finished_run_is_made_to_its_end() -> None:
    assert _said(stretch.find(_view({}))) == (0, None, {"lr": 1.0}, 1)


def test_a_run_that_ended_early_is_made_to_its_last_step() -> None:
    assert stretch.find(_view({}, steps=12, status="stopped")).until == 12
    assert stretch.find(_view({}, steps=12, status="failed")).until == 12


def test_attempts_that_changed_nothing_are_one_stretch() -> None:
    view = _view({}, {"resumed_from": 10}, {"resumed_from": 10}, {"resumed_from": 20})
    assert _said(stretch.find(view)) == (0, None, {"lr": 1.0}, 1)


def test_it_ends_where_the_config_the_code_or_the_ranks_changed() -> None:
    drifted = _view({}, {"resumed_from": 10, "drift": {"lr": [1.0, 2.0]}})
    first = stretch.find(drifted)
    assert _said(first) == (0, 10, {"lr": 1.0}, 1)
    assert "lr from 1.0 to 2.0" in first.why
    assert _said(stretch.find(drifted, after=10)) == (10, None, {"lr": 2.0}, 1)
    other = {"code": {"train.py": "another"}}
    edited = _view({}, {"resumed_from": 10, **other}, {"resumed_from": 20, **other})
    assert (stretch.find(edited).until, stretch.find(edited, after=10).until) == (10, None)
    assert stretch.find(edited).why == "it resumed with different code: train.py"
    grown = _view({}, {"resumed_from": 10, "world": 4})
    assert "4 ranks instead of 1" in stretch.find(grown).why
    assert _said(stretch.find(grown, after=20)) == (20, None, {"lr": 1.0}, 4)


def test_what_ended_by_itself_before_it_was_continued_with_another_config_is_made_to_its_end() -> None:
    more = {"resumed_from": 10, "drift": {"steps": [10, 30]}}
    ended = _view({"status": "finished", "step": 10}, more)
    assert (stretch.find(ended).until, stretch.find(ended).stop_at) == (10, None)
    assert (stretch.find(ended, steps=9).stop_at, stretch.find(ended, steps=20).stop_at) == (9, None)
    older = _view({"status": "finished", "step": 12}, more)  # its last checkpoint could not be used
    killed = _view({}, more)
    assert stretch.find(older).stop_at == stretch.find(killed).stop_at == 10
    assert stretch.find(ended, after=10).stop_at is None
    assert stretch.find(_view({}, steps=12, status="stopped")).stop_at == 12


def test_what_was_trained_again_with_another_config_is_of_that() -> None:
    view = _view({}, {"resumed_from": 20, "drift": {"lr": [1.0, 3.0]}}, {"resumed_from": 10})
    assert _said(stretch.find(view)) == (0, None, {"lr": 1.0}, 1)


def test_steps_shorten_it_and_never_lengthen_it() -> None:
    assert stretch.find(_view({}), steps=5).until == 5
    assert stretch.find(_view({}), after=20, steps=5).until == 25
    assert stretch.find(_view({}), steps=30).until is None
    assert stretch.find(_view({}, {"resumed_from": 10, "world": 4}), steps=15).until == 10


def test_a_run_that_began_from_the_checkpoint_of_another_begins_there() -> None:
    assert _said(stretch.find(_view({"resumed_from": 8}))) == (8, None, {"lr": 1.0}, 1)


def test_a_run_without_steps_is_made_again_if_it_finished() -> None:
    measured = series(test_loss={0: 1.0})
    assert _said(stretch.find(replace(_view({}), points=measured))) == (0, None, {"lr": 1.0}, 1)
    with pytest.raises(BadInput, match="no step after step 0"):
        stretch.find(replace(_view({}, status="failed"), points=measured))


def test_there_must_be_something_to_compare_with() -> None:
    with pytest.raises(BadInput, match="logged nothing"):
        stretch.find(_view({}, steps=0))
    with pytest.raises(BadInput, match="no step after step 30"):
        stretch.find(_view({}), after=30)
