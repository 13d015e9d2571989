"""What a report says of a run's time, memory and rates, from journals whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from stoker.engine.pace import Rate
from stoker.errors import BadInput
from stoker.report import html, performance, performance_section, scaling
from stoker.report.performance import Memory, RankMemory
from stoker.run import journal, media, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView

Said = tuple[float, str, dict[str, Any]]


def _run(path: Path, *attempts: Sequence[Said], run_id: str = "a", recipe: str = "llm") -> RunDirectory:
    """A run whose attempts say these events at these times."""
    directory = RunDirectory(path / "runs" / "llm" / run_id)
    about = {"id": run_id, "experiment": "llm", "config": {}, "sources": {}, "recipe": {"name": recipe}}
    directory.create(about)
    for attempt in attempts:
        _, writer = journal.start_attempt(directory.journal)
        for time, kind, fields in attempt:
            more = {"pid": 1, "host": "here"} if kind == "attempt_started" else {}
            writer.append(kind, time=time, **more, **fields)
        writer.close()
    return directory


def _spent(time: float, step: int, *seconds: float, over: bool = False) -> Said:
    names = ("waiting", "evaluating", "checkpointing")
    return time, "spent", {"step": step, "over": over, "seconds": dict(zip(names, seconds, strict=True))}


def _began(time: float) -> Said:
    return time, "plan", {"total_steps": 40, "samples_per_step": 8, "tokens_per_step": 1024.0}


def _metrics(time: float, step: int, **values: float) -> Said:
    return time, "metrics", {"step": step, "values": journal.encode_values(values)}


@pytest.fixture
def killed_twice(tmp_path: Path) -> RunDirectory:
    """Killed at step 25, then before its first checkpoint; the third attempt ends and tests."""
    return _run(
        tmp_path,
        [
            (1000, "attempt_started", {}),
            _spent(1008, 0, 0, 3, 0),
            _began(1010),
            _metrics(1020, 10, loss=4.0, tokens_per_second=100.0),
            _metrics(1028, 20, loss=2.0, tokens_per_second=300.0),
            _spent(1030, 20, 2, 3, 1),
            _metrics(1035, 25, loss=0.1),
            _spent(1036, 25, 2, 5, 1),
            (1040, "note", {"text": "the last it said"}),
        ],
        [
            (1045, "attempt_started", {}),
            (1046, "resumed", {"step": 20, "passed_over": []}),
            _began(1050),
            _metrics(1060, 25, loss=0.1),
        ],
        [
            (1100, "attempt_started", {}),
            (1101, "resumed", {"step": 20, "passed_over": []}),
            _began(1104),
            _metrics(1120, 30, loss=1.5, tokens_per_second=200.0, mfu=0.25),
            _metrics(1125, 40, loss=math.nan, val_loss=3.0),
            _spent(1130, 40, 1, 4, 2, over=True),
            _spent(1136, 40, 1, 9, 2),
            (1140, "attempt_ended", {"status": "finished", "error": None}),
        ],
    )


def test_the_time_of_a_run_adds_up_to_all_of_it(killed_twice: RunDirectory) -> None:
    spent = performance.time_spent(view.load(killed_twice))
    assert spent == {
        "training": 17
        + 19,  # of attempt 1 until the checkpoint at step 20, of attempt 3 until its loop was over
        "waiting for data": 2 + 1,
        "evaluating": 3 + 4 + 5,  # before the loop, in it, and after it
        "checkpoints": 1 + 2,
        "starting": 7 + 5 + 4,
        "after the loop": 5,
        "lost and done again": 10 + 10,
        "between attempts": 5 + 40,
    }
    assert sum(spent.values()) == 1140 - 1000


def test_what_was_done_since_the_newest_checkpoint_is_not_lost_before_anyone_went_back(
    tmp_path: Path,
) -> None:
    events = [(0, "attempt_started", {}), _began(10), _spent(30, 20, 2, 0, 1), _metrics(50, 30, loss=1.0)]
    spent = performance.time_spent(view.load(_run(tmp_path, events)))
    assert (spent["training"], spent["lost and done again"], sum(spent.values())) == (37, 0, 50)


def test_all_is_lost_of_an_attempt_whose_checkpoint_could_not_be_used(tmp_path: Path) -> None:
    first = [(0, "attempt_started", {}), _began(10), _spent(30, 20, 2, 0, 1)]
    second = [(30, "attempt_started", {}), (31, "resumed", {"step": 0, "passed_over": ["it"]}), _began(40)]
    spent = performance.time_spent(view.load(_run(tmp_path, first, second)))
    assert (spent["training"], spent["lost and done again"], spent["starting"]) == (0, 20, 20)


def test_an_attempt_that_died_while_it_started_takes_nothing_from_the_one_before(tmp_path: Path) -> None:
    first = [(0, "attempt_started", {}), _began(10), _spent(30, 20, 2, 0, 1)]
    second = [(40, "attempt_started", {}), (45, "note", {"text": "out of memory"})]
    spent = performance.time_spent(view.load(_run(tmp_path, first, second)))
    assert (spent["training"], spent["starting"], spent["between attempts"]) == (17, 15, 10)


def test_a_stopped_run_has_lost_nothing(tmp_path: Path) -> None:
    first = [
        (0, "attempt_started", {}), _began(10), _spent(30, 20, 2, 0, 1, over=True),
        (32, "attempt_ended", {"status": "preempted", "error": None}),
    ]  # fmt: skip
    second = [(40, "attempt_started", {}), (41, "resumed", {"step": 20, "passed_over": []}), _began(42)]
    spent = performance.time_spent(view.load(_run(tmp_path, first, second)))
    assert (spent["lost and done again"], spent["after the loop"]) == (0, 2)


def test_a_compacted_run_says_the_same(killed_twice: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.run.compact._WORTH_IT", 1)
    folded = view.load(killed_twice)
    assert killed_twice.compacted.is_file()
    again = view.load(killed_twice)
    assert performance.time_spent(again) == performance.time_spent(folded)
    assert again.tokens_per_step == 1024


def test_the_rate_is_the_median_and_the_slowest_is_named(killed_twice: RunDirectory) -> None:
    found = performance.throughput(view.load(killed_twice))
    assert found is not None
    assert (found.unit, found.median, found.slowest, found.slowest_step) == ("tokens", 200, 100, 10)
    assert found.mfu == 0.25


def test_memory_is_that_of_the_newest_table_beside_what_a_rank_has(tmp_path: Path) -> None:
    directory = _run(
        tmp_path,
        [
            (0, "attempt_started", {}),
            (1, "layout", {"parallel": "ddp", "memory_bytes": 8 * 2**30}),
            (2, "peak", {"flops": 989e12, "source": "data sheet of H100"}),
        ],
    )
    _, writer = journal.start_attempt(directory.journal)
    columns = ["rank", "weights, GiB", "activations and others", "peak"]
    for step, most in ((1, 3.0), (2, 5.0)):
        encoded = media.table([[0, 1.0, most - 1, most], [1, 1.0, 1.0, 2.0]], columns)
        file = media.write(directory, "table", "memory", step, encoded)
        about = {"kind": "table", "name": "memory", "step": step, "file": file, "about": encoded.about}
        writer.append("media", **about)
    writer.close()
    seen = view.load(directory)
    ranks = [
        RankMemory(0, {"weights": 1.0, "activations and others": 4.0}, 5.0),
        RankMemory(1, {"weights": 1.0, "activations and others": 1.0}, 2.0),
    ]
    assert performance.memory(seen) == Memory(ranks, 8.0)
    page = html.render([seen])
    assert "5.00 GiB of 8.00 GiB" in page
    assert "<h2>Tables</h2>" not in page, "it is shown once"


def test_a_loss_is_reached_once_and_the_time_is_that_in_attempts(killed_twice: RunDirectory) -> None:
    found = performance.descent(view.load(killed_twice), "loss")
    assert found is not None
    assert found.steps.tolist() == [10, 20, 30]
    assert found.values.tolist() == [4.0, 3.0, 2.5], "the mean of the points so far"
    assert found.seconds.tolist() == [20, 28, 40 + 15 + 20], "without what lies between attempts"
    assert [found.reached(loss) for loss in (5.0, 3.0, 2.9, 2.0)] == [0, 1, 2, None]


def test_of_many_points_few_are_kept_and_each_loss_is_found_by_them(tmp_path: Path) -> None:
    losses = np.exp(-np.arange(5000) / 1000)
    events = [_metrics(float(i), i + 1, val_loss=float(loss)) for i, loss in enumerate(losses)]
    found = performance.descent(view.load(_run(tmp_path, [(0, "attempt_started", {}), *events])), "val_loss")
    assert found is not None
    assert len(found.steps) <= 501
    for wanted in (0.9, 0.5, 0.1, float(losses[-1])):
        at = found.reached(wanted)
        assert at is not None
        assert wanted - 1 / 400 <= found.values[at] <= wanted


def test_losses_on_the_way_are_round_and_each_tells_something(tmp_path: Path) -> None:
    events = [_metrics(float(i), i + 1, val_loss=2.3 + 6 * 0.9**i) for i in range(80)]
    found = performance.descent(view.load(_run(tmp_path, [(0, "attempt_started", {}), *events])), "val_loss")
    assert found is not None
    assert performance.thresholds([found, None]) == [6.0, 4.0, 3.0, 2.7, 2.5]
    assert performance.thresholds([None]) == []


def test_a_run_without_a_trainer_has_no_such_section(tmp_path: Path) -> None:
    events = [(0.0, "attempt_started", {}), *(_metrics(i, i, loss=1 / i) for i in range(1, 9))]
    page = html.render([view.load(_run(tmp_path, events))])
    assert "<h2>Performance</h2>" not in page
    assert "<h2>Curves</h2>" in page


def test_bars_fill_their_width_and_leave_out_a_weekend(killed_twice: RunDirectory) -> None:
    def shown(spent: Mapping[str, float]) -> tuple[float, str]:
        bar = performance_section.time_bar(spent, "")
        shares = [float(part.split("%")[0]) for part in bar.split("width: ")[1:]]
        return sum(shares), bar.rpartition('class="said">')[2].partition("<")[0]

    spent = performance.time_spent(view.load(killed_twice))
    assert shown(spent) == (pytest.approx(100, abs=0.01), "2:20")
    assert shown({**spent, "between attempts": 2e5}) == (pytest.approx(100, abs=0.01), "1:35 in attempts")


RESULT: dict[str, Any] = {
    "recipe": "llm", "machine": {"system": "Linux", "processor": "Epyc", "cores": 4, "memory_bytes": 2**34,
                                 "gpus": []},
    "torch": "2", "stoker": "0", "cores_per_rank": 2, "steps": 5, "repeats": 1,
    "rows": [
        {"scaling": "strong", "ranks": ranks, "batch_size": 8, "unit": "tok", "rate": 1000.0 * ranks,
         "rates": [1000.0 * ranks], "efficiency": 1.0, "peak_bytes": [2**30] * ranks, "waiting": 0.0,
         "communication": 0.1, "parallel": "ddp", "precision": "fp32", "cause": ""}
        for ranks in (1, 2)
    ],
}  # fmt: skip


def test_scaling_is_shown_where_it_stands_beside_the_runs_of_its_recipe(tmp_path: Path) -> None:
    seen = view.load(_run(tmp_path, [(0.0, "attempt_started", {})]))
    other = view.load(_run(tmp_path, [(0.0, "attempt_started", {})], run_id="b", recipe="image"))
    assert scaling.measured([seen]) == []
    scaling.write(RESULT, tmp_path / "runs" / "llm" / "scaling.html")
    assert scaling.measured([seen, seen]) == [RESULT]
    assert scaling.measured([other]) == []
    assert "How llm scales" in html.render([seen], [scaling.load(tmp_path / "runs" / "llm" / "scaling.html")])


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"rows": [1]}', orjson.dumps({**RESULT, "rows": []})])
def test_a_file_that_is_no_scaling_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scaling.json").write_bytes(content)
    with pytest.raises(BadInput, match="is not a result of `stoker bench scaling`"):
        scaling.load(tmp_path / "scaling.json")
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        scaling.load(tmp_path / "nothing.json")


def test_an_evaluation_within_a_step_makes_the_step_neither_longer_nor_shorter() -> None:
    now = [0.0]
    rate = Rate(clock=lambda: now[0])
    for step in range(4):
        now[0] += 1
        if step == 2:
            now[0] += 100
            rate.leave_out(100)
        rate.step()
    assert rate.steps_per_second == 1


def test_a_view_says_its_performance_as_json(killed_twice: RunDirectory) -> None:
    seen: RunView = view.load(killed_twice)
    found = performance.as_json(seen)
    assert found["throughput"]["median"] == 200
    assert found["memory"] is None
    assert found["seconds"]["between attempts"] == 45


def test_what_a_journal_says_wrongly_of_its_time_is_damage_and_not_a_report_that_fails(
    tmp_path: Path,
) -> None:
    wrong = [(11, "spent", {"step": 1, "over": False, "seconds": {}}), (12, "peak", {"flops": "many"})]
    seen = view.load(_run(tmp_path, [(0, "attempt_started", {}), _began(10), *wrong]))
    assert len(seen.damage) == 2
    assert "could not be read" in html.render([seen])
