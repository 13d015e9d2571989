from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from stoker.report import plots
from stoker.run.directory import RunDirectory
from stoker.run.state import AttemptView, LeftOut, RunView

from support import series

Points = dict[str, dict[int, float]]


def _view(points: Points, attempts: list[AttemptView] | None = None) -> RunView:
    return RunView(RunDirectory(Path("runs/llm/a")), {}, points=series(**points), attempts=attempts or [])


CURVE = {1: 1.0, 2: 0.5}


def test_the_splits_of_a_metric_share_a_figure_and_the_loss_comes_first() -> None:
    points = {"accuracy": CURVE, "val/accuracy": CURVE, "val_loss": CURVE, "loss": CURVE, "validity": CURVE}
    figures = plots.figures([_view(points)], ["a"])
    assert {f["title"]: [c["name"] for c in f["curves"]] for f in figures} == {
        "loss": ["loss", "val_loss"], "accuracy": ["accuracy", "val/accuracy"], "validity": ["validity"],
    }  # fmt: skip
    assert figures[0]["title"] == "loss"


def test_a_metric_of_one_point_is_no_figure_but_joins_one() -> None:
    points = {"seconds": {9: 1.0}, "val_perplexity": CURVE, "test_perplexity": {9: 1.0}}
    (figure,) = plots.figures([_view(points)], ["a"])
    assert [c["name"] for c in figure["curves"]] == ["val_perplexity", "test_perplexity"]


def test_runs_differ_in_colour_and_their_metrics_in_dash() -> None:
    view = _view({"loss": CURVE, "val_loss": CURVE})
    (figure,) = plots.figures([view, view], ["a", "b"])
    assert [(c["name"], c["color"], c["dash"]) for c in figure["curves"]] == [
        ("a · loss", 0, 0), ("a · val_loss", 0, 1), ("b · loss", 1, 0), ("b · val_loss", 1, 1),
    ]  # fmt: skip


def test_what_is_not_finite_leaves_a_gap() -> None:
    (figure,) = plots.figures([_view({"loss": {1: 1.0, 2: math.nan, 3: math.inf}})], ["a"])
    assert figure["curves"][0]["y"] == [1.0, None, None]


def test_every_resume_is_marked_at_its_step() -> None:
    attempts = [AttemptView(1, 0.0), AttemptView(2, 1.0, resumed_from=7), AttemptView(3, 2.0)]
    (figure,) = plots.figures([_view({"loss": CURVE}, attempts)], ["a"])
    (mark,) = figure["marks"]
    assert mark["x"] == 7
    assert mark["text"].startswith("attempt 2 resumed from step 7")


def test_every_batch_that_was_left_out_is_marked_at_its_step() -> None:
    view = _view({"loss": CURVE}, [AttemptView(1, 0.0)])
    view.left_out = [LeftOut(2, [32, 63], "the loss is nan", 1.0, rewound_to=1)]
    (figure,) = plots.figures([view], ["a"])
    (mark,) = figure["marks"]
    assert (mark["x"], mark["label"]) == (2, "✕")
    said = "step 2: the loss is nan; its batch was left out; the weights went back to those of step 1"
    assert mark["text"] == said


def test_names_reach_plotly_without_tags() -> None:
    (figure,) = plots.figures([_view({'<a href="x">': CURVE})], ["a"])
    assert figure["curves"][0]["name"] == "&lt;a href=&quot;x&quot;&gt;"


@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float]) -> None:
    kept = plots.thinned(np.array(values), most=10).tolist()
    assert len(kept) <= 12
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert {min(values), max(values)} <= {values[i] for i in kept}
