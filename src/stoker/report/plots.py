"""The figures of a report: which curves stand together, and the points they are drawn from.

A figure holds one metric over every split it was measured on (`loss` with `val_loss`) and
over every run. What comes out is plain JSON for the page's script; nothing is drawn here.
A curve of more points than a screen has pixels is thinned to the lowest and the highest
point of each stretch, so that a spike is never lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from stoker.run.view import Attempt, RunView

Figure = dict[str, Any]

MOST_POINTS = 4000  # of one curve
_MOST_MARKS = 24  # of one run; more would hide the curves
_DASHES = ("solid", "dashed", "dotted", "dash-dotted")  # in the order of the page's script
_SPLIT = re.compile(r"(?:base_)?(?:train|val|valid|validation|eval|dev|test)[_/](?=.)")


def figures(views: Sequence[RunView], names: Sequence[str]) -> list[Figure]:
    """The figures of some runs, the loss first; `names` are what the runs are called in them.

    A figure is {title, note, legend, curves: [{name, x, y, color, dash}], marks: [{x, label, text, color}]}.
    `color` counts runs, or curves where there is one run; `dash` counts the metrics of a run, as
    `note` says. Several runs are told apart by a key to all figures, and need no `legend` in each.
    A metric of which no run has two points is a number and not a curve, and is left out.
    """
    groups: dict[str, list[str]] = {}
    for metric in sorted({name for view in views for name in view.points}):
        groups.setdefault(_SPLIT.sub("", metric, count=1), []).append(metric)
    marks = [mark for i, view in enumerate(views) for mark in _marks(view, names[i], i, len(views) > 1)]
    return [
        {
            "title": title,
            "note": _dash_note(metrics) if len(views) > 1 else "",
            "legend": len(views) == 1 and metrics != [title],
            "curves": _curves(views, names, metrics),
            "marks": marks,
        }
        for title, metrics in sorted(groups.items(), key=lambda group: (group[0] != "loss", group[0]))
        if any(len(view.points.get(metric, ())) > 1 for view in views for metric in metrics)
    ]


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most about `most` of the points, with the extremes of every stretch and both ends."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), stretch):
        indices = range(begin, min(begin + stretch, len(points)))
        finite = [i for i in indices if math.isfinite(points[i][1])] or [begin]
        kept.add(min(finite, key=lambda i: points[i][1]))
        kept.add(max(finite, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def _curves(views: Sequence[RunView], names: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    several = len(views) > 1
    curves = []
    for i, view in enumerate(views):
        for j, metric in enumerate(sorted(metrics, key=_splits_last)):
            points = thinned(list(view.points.get(metric, {}).items()))
            if not points:
                continue
            label = f"{names[i]} · {metric}" if several and len(metrics) > 1 else names[i]
            curves.append({
                "name": escape(label if several else metric),  # Plotly reads tags in its texts
                "x": [step for step, _ in points],
                "y": [value if math.isfinite(value) else None for _, value in points],
                "color": i if several else j,
                "dash": j if several else 0,
            })  # fmt: skip
    return curves


def _dash_note(metrics: Sequence[str]) -> str:
    dashes = zip(sorted(metrics, key=_splits_last), _DASHES, strict=False)
    return ", ".join(f"{metric} {dash}" for metric, dash in dashes) if len(metrics) > 1 else ""


def _splits_last(metric: str) -> tuple[bool, bool, str]:
    return _SPLIT.match(metric) is not None, not metric.startswith("val"), metric


def _marks(view: RunView, name: str, color: int, several: bool) -> list[dict[str, Any]]:
    """Where an attempt went on from, for a vertical line."""
    resumed = [a for a in view.attempts if a.resumed_from is not None]
    return [
        {
            "x": attempt.resumed_from,
            "label": "" if several else f"↻ {attempt.number}",
            "text": escape(f"{name}: {_said(attempt)}" if several else _said(attempt)),
            "color": color if several else None,
        }
        for attempt in resumed[-_MOST_MARKS:]
    ]


def _said(attempt: Attempt) -> str:
    at = datetime.fromtimestamp(attempt.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"attempt {attempt.number} went on from step {attempt.resumed_from} at {at}"
