from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker import storage
from stoker.run import journal, series, view
from stoker.run.directory import RunDirectory


def _run(path: Path) -> RunDirectory:
    directory = RunDirectory(path / "runs" / "llm" / "a")
    directory.create({"id": "a", "config": {"lr": 0.1, "seed": 0}, "sources": {}})
    return directory


def _attempt(directory: RunDirectory, events: list[dict[str, Any]], **started: Any) -> None:
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="h", **started)
    for event in events:
        writer.append(event.pop("type"), **event)
    writer.close()


def _points(*steps: int, value: float = 0.0) -> list[dict[str, Any]]:
    return [{"type": "metrics", "step": s, "values": {"loss": value + s}} for s in steps]


def _resumed(step: int) -> dict[str, Any]:
    return {"type": "resumed", "step": step, "passed_over": []}


def test_resuming_from_a_step_voids_every_later_point(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, _points(1, 2, 3, 4, 5))
    _attempt(directory, [_resumed(2), *_points(3, 4, value=100)])
    seen = view.load(directory)
    assert seen.points["loss"] == {1: 1, 2: 2, 3: 103, 4: 104}
    assert seen.step == 4
    assert [a.resumed_from for a in seen.attempts] == [None, 2]


def test_the_step_of_a_trainers_run_is_what_it_has_trained_not_what_it_has_logged(tmp_path: Path) -> None:
    def ended(**made: int) -> dict[str, Any]:
        return {"type": "attempt_ended", "status": "failed", "error": None, **made}

    directory = _run(tmp_path)
    _attempt(directory, [*_points(50, 100), ended(step=80)])
    assert view.load(directory).step == 80
    _attempt(directory, [])
    assert view.load(directory).step == 100, "it has not resumed yet"
    _attempt(directory, [_resumed(80)])
    assert view.load(directory).step == 80, "it has not logged yet"
    _attempt(directory, [ended()])
    assert view.load(directory).step == 80, "it failed before it resumed"
    _attempt(directory, [_resumed(80), *_points(90), ended(step=95)])
    assert view.load(directory).step == 95
    _attempt(directory, [_resumed(40), ended(step=40)])
    assert view.load(directory).step == 40
    _attempt(directory, [_resumed(0), *_points(1)])
    assert view.load(directory).step == 1


def test_an_attempt_that_found_no_checkpoint_begins_anew(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, _points(0, 1, 2))
    _attempt(directory, [_resumed(0), *_points(0, 1, value=100)])
    assert view.load(directory).points["loss"] == {0: 0, 1: 101}


def test_a_point_logged_again_without_a_resume_keeps_its_first_value(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [*_points(1), *_points(1, value=100)])
    assert view.load(directory).points["loss"] == {1: 1}


def test_checkpoints_and_media_past_the_resumed_step_are_void(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    table = {"type": "media", "kind": "table", "name": "t", "file": None, "about": {}}
    marks = [{"type": "checkpoint", "step": s, "path": "", "bytes": 1} for s in (2, 4)]
    _attempt(directory, [*marks, {**table, "step": 2}, {**table, "step": 4}])
    _attempt(directory, [_resumed(2)])
    seen = view.load(directory)
    assert seen.checkpoints == [2]
    assert [t.step for t in seen.media] == [2]


def test_a_batch_that_is_left_out_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    directory = _run(tmp_path)

    def bad(step: int) -> list[dict[str, Any]]:
        skipped = {"type": "skipped", "step": step, "samples": [step, step], "reason": "the loss is nan"}
        return [skipped, {"type": "rewound", "step": step, "to": step - 1}]

    _attempt(directory, [*bad(2), *bad(4)])
    _attempt(directory, [_resumed(3), *bad(4), *bad(4)])
    _attempt(directory, [_resumed(4), {"type": "skipped", "step": 6}])
    seen = view.load(directory)
    assert [(batch.step, batch.rewound_to) for batch in seen.left_out] == [(2, 1), (4, 3)]
    assert "incomplete event" in seen.damage[0].reason


def test_rows_have_every_metric_by_step(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [*_points(1, 2), {"type": "metrics", "step": 2, "values": {"val": 7.0}}])
    table = view.load(directory).metrics()
    assert [str(kind) for kind in table.schema.types] == ["int64", "double", "double"]
    assert table.to_pylist() == [{"step": 1, "loss": 1, "val": None}, {"step": 2, "loss": 2, "val": 7}]


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("loss", "min"), ("val/loss", "min"), ("loss/train", "min"), ("error_rate", "min"),
        ("top1_accuracy", "max"), ("loss_scale", None), ("loss/weight", None), ("precision_bits", None),
        ("learning_rate", None),
    ],
)  # fmt: skip
def test_which_way_a_metric_is_better_is_guessed_of_measures_alone(name: str, goal: str | None) -> None:
    assert series.guess_goal(name) == goal


def test_config_is_the_newest_attempts(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [])
    _attempt(directory, [], drift={"lr": [0.1, 0.2]})
    assert view.load(directory).config == {"lr": 0.2, "seed": 0}


@pytest.mark.parametrize("status", ["finished", "failed", "preempted", "interrupted"])
def test_status_is_what_the_last_attempt_said(tmp_path: Path, status: str) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [{"type": "attempt_ended", "status": status, "error": None}])
    assert view.load(directory).status == status


def test_an_attempt_that_said_nothing_is_running_while_its_process_lives(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, _points(1))
    with storage.locked(directory.lock_file):
        assert view.load(directory).status == "running"
    assert view.load(directory).status == "killed"


@pytest.mark.parametrize(
    ("said", "status"), [("failed", "preempted"), (None, "preempted"), ("finished", "finished")]
)
def test_an_attempt_that_a_lost_machine_ended_did_not_fail(
    tmp_path: Path, said: str | None, status: str
) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [{"type": "attempt_ended", "status": said, "error": "no peer"}] if said else [])
    journal.note_failure(directory.journal, 1, "rank 0: no peer")
    journal.note_failure(directory.journal, 1, "b does not respond", status="preempted")
    seen = view.load(directory)
    assert (seen.status, seen.attempts[-1].error) == (status, "b does not respond")


@given(kills=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5))
def test_the_curve_has_one_point_a_step_whatever_was_killed_when(
    tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, int]]
) -> None:
    """Each attempt goes on from some checkpoint before its start, for some steps, and is killed."""
    directory = _run(tmp_path_factory.mktemp("run"))
    reached = 0
    for number, (back, steps) in enumerate([*kills, (0, 20)]):
        begin = max(0, reached - back)
        events = [_resumed(begin)] if number else []
        _attempt(directory, [*events, *_points(*range(begin + 1, begin + steps + 1))])
        reached = begin + steps
    points = view.load(directory).points.get("loss", {})
    assert list(points) == list(range(1, reached + 1))


def test_a_tag_that_was_set_again_stands_though_the_clock_was_set_back(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    _attempt(directory, [{"type": "tags", "tags": {"stage": "first", "owner": "a"}, "time": 2000.0}])
    _attempt(directory, [{"type": "tags", "tags": {"stage": "second"}, "time": 1000.0}])
    outside = journal.control(directory.journal)
    outside.append("tags", tags={"stage": "between"}, time=900.0)
    outside.append("tags", tags={"owner": "b"}, time=3000.0)
    outside.close()
    assert view.load(directory).tags == {"stage": "second", "owner": "b"}
