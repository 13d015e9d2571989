"""The figures of a report: which curves share a figure, and the points they are drawn from.

A figure holds one metric over every split it was measured on (`loss` with `val_loss`) and
over every run. The result is plain JSON for the page's script; nothing is drawn here.
A curve with more points than a screen has pixels is thinned to the lowest and the highest
point of each stretch, so that no spike is lost. The means of the stretches are included too,
for a smoothed curve that spikes do not distort.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from stoker.report import facts
from stoker.run.series import Series
from stoker.run.state import AttemptView, LeftOut, Media, RunView

T = TypeVar("T")

Figure = dict[str, Any]

MOST_POINTS = 4000  # of one curve
MOST_HISTOGRAMS = 4000  # of all runs
_MOST_IN_ALL = 200_000  # points of all curves of a page
_LEAST_POINTS = 100  # of one curve, however many there are
_MOST_OF_MACHINE = 600
_MOST_BAD = 200  # marks of one curve for values that are not finite
_MOST_STEPS = 60  # of one histogram
_MOST_MARKS = 24  # of one run; more would hide the curves
_DASHES = ("solid", "dashed", "dotted", "dash-dotted")  # in the order of the page's script
_SPLIT = re.compile(r"(?:base_)?(?:train|val|valid|validation|eval|dev|test)[_/](?=.)")
_GPU = re.compile(r"^gpu_(\d+)_(.+)$")


class Clock:
    """Seconds that a run has spent in its attempts up to a moment, without the time between attempts."""

    def __init__(self, view: RunView) -> None:
        self._starts = np.array([attempt.started for attempt in view.attempts] or [0.0])
        ends = np.array([a.ended or a.last_event for a in view.attempts] or [0.0])
        for series in (*view.points.values(), *view.system.values()):  # a killed attempt has no end
            np.maximum.at(ends, self._attempt(series.time), series.time)
        spent = np.clip(np.minimum(ends, [*self._starts[1:], math.inf]) - self._starts, 0, None)
        self._before = np.concatenate([[0.0], np.cumsum(spent)[:-1]])

    def at(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds spent up to each moment."""
        attempt = self._attempt(time)
        spent: NDArray[np.float64] = self._before[attempt] + np.clip(time - self._starts[attempt], 0, None)
        return spent

    def _attempt(self, time: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(np.searchsorted(self._starts, time, side="right") - 1, 0, None)


def runs(views: Sequence[RunView], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the page's script needs for each run: {name, samples}, the samples per step or None."""
    return [
        {"name": escape(name), "samples": view.samples_per_step}
        for view, name in zip(views, names, strict=True)
    ]


def figures(views: Sequence[RunView], names: Sequence[str]) -> list[Figure]:
    """The figures of some runs, the loss first; `names` are the names of the runs in them.

    A figure is {title, note, legend, curves, marks: [{run, x, t, label, text, color}]}, and a
    curve {run, name, x, y, t, bad, mean, color, dash}: `t` are seconds spent, `bad` the points
    that are not finite, `mean` the points for the smoothed curve if the curve was thinned.
    `color` counts runs, or curves if there is one run; `dash` counts the metrics of a run, as
    `note` says. Several runs share one key for all figures, so no figure needs its own `legend`.
    A metric with fewer than two points in every run is a number, not a curve, and is left out.
    """
    groups: dict[str, list[str]] = {}
    for metric in sorted({name for view in views for name in view.points}):
        groups.setdefault(_SPLIT.sub("", metric, count=1), []).append(metric)
    drawn = {
        title: metrics
        for title, metrics in sorted(groups.items(), key=lambda group: (group[0] != "loss", group[0]))
        if any(len(view.points.get(metric, ())) > 1 for view in views for metric in metrics)
    }
    clocks = [Clock(view) for view in views]
    most = _share(sum(metric in view.points for ms in drawn.values() for metric in ms for view in views))
    marks = [
        mark
        for i, view in enumerate(views)
        for mark in _marks(view, clocks[i], names[i], i, several=len(views) > 1)
    ]
    return [
        {
            "title": title,
            "note": _dash_note(metrics) if len(views) > 1 else "",
            "legend": len(views) == 1 and metrics != [title],
            "curves": _curves(views, clocks, names, metrics, most),
            "marks": marks,
        }
        for title, metrics in drawn.items()
    ]


def machine(views: Sequence[RunView], names: Sequence[str]) -> list[Figure]:
    """The figures of the machine metrics, like those of `figures`; the GPUs of a run share one figure."""
    groups: dict[str, list[str]] = {}
    for metric in sorted({name for view in views for name in view.system}):
        groups.setdefault(_GPU.sub(r"gpu_\2", metric), []).append(metric)
    clocks = [Clock(view) for view in views]
    return [
        {
            "title": title.replace("_", " "),
            "note": "",
            "legend": len(views) == 1 and len(metrics) > 1,
            "curves": [
                {
                    **_curve(view.system[metric], clocks[i], _MOST_OF_MACHINE),
                    "run": i,
                    "name": escape(" · ".join([*([names[i]] if len(views) > 1 else []), _device(metric)])),
                    "color": i if len(views) > 1 else j,
                    "dash": j if len(views) > 1 else 0,
                }
                for i, view in enumerate(views)
                for j, metric in enumerate(metrics)
                if len(view.system.get(metric, ()))
            ],
            "marks": [],
        }
        for title, metrics in groups.items()
    ]


def histograms(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """The histograms by name and run: {title, run, all, steps: [{step, low, high, counts, bad}]}.

    If there are too many steps for a page, some in between are left out; `all` is the original number.
    """
    found: dict[tuple[str, int], list[Media]] = {}
    for i, view in enumerate(views):
        for name, logged in facts.logged(view, "histogram").items():
            whole = [media for media in logged if _is_histogram(media.about)]
            found.update({(name, i): whole} if whole else {})
    most = max(1, min(_MOST_STEPS, MOST_HISTOGRAMS // max(1, len(found))))
    return [
        {
            "title": name,
            "run": i,
            "all": len(logged),
            "steps": [_histogram(m) for m in spread(logged, most)],
        }
        for (name, i), logged in sorted(found.items())[:MOST_HISTOGRAMS]
    ]


def thinned(y: NDArray[np.float64], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """The indices of at most about `most` values: the extremes of every stretch, and both ends.

    A stretch with values that are not finite also keeps the first of these.
    """
    if len(y) <= most:
        return np.arange(len(y))
    grid, begins = _stretches(y, most)
    finite = np.isfinite(grid)
    lowest = begins + np.where(finite, grid, math.inf).argmin(axis=1)
    highest = begins + np.where(finite, grid, -math.inf).argmax(axis=1)
    bad = (begins + (~finite).argmax(axis=1))[~finite.all(axis=1)]
    kept = np.unique(np.concatenate([[0, len(y) - 1], lowest, highest, bad]))
    return kept[kept < len(y)]


def _stretches(values: NDArray[Any], most: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The values as rows of equally long stretches, padded with NaN, and the start of each."""
    length = math.ceil(len(values) / (most // 2))
    count = math.ceil(len(values) / length)
    grid = np.full(count * length, math.nan)
    grid[: len(values)] = values
    return grid.reshape(count, length), np.arange(count) * length


def _share(curves: int) -> int:
    """How many points each of so many curves may have."""
    return max(_LEAST_POINTS, min(MOST_POINTS, _MOST_IN_ALL // max(1, curves)))


def _curve(series: Series, clock: Clock, most: int) -> dict[str, Any]:
    time = clock.at(series.time)
    kept = thinned(series.y, most)
    x, y, t = series.x[kept], series.y[kept], time[kept]
    bad = np.flatnonzero(~np.isfinite(y))
    if len(bad) > _MOST_BAD:
        bad = bad[np.linspace(0, len(bad) - 1, _MOST_BAD).astype(np.int64)]
    return {
        "x": x.tolist(),
        "y": _numbers(y),
        "t": _numbers(t),
        "bad": [[int(x[i]), _numbers(t)[i], _said_number(y[i])] for i in bad],
        "mean": _means(series, time, most) if len(series) > most else None,
    }


def _means(series: Series, time: NDArray[np.float64], most: int) -> dict[str, Any]:
    """The mean of every stretch's finite values, placed at its middle."""
    grid, begins = _stretches(series.y, most)
    finite = np.isfinite(grid)
    count = finite.sum(axis=1)
    scale = np.where(finite, np.abs(grid), 0).max(axis=1)  # else the sum of huge values is infinite
    scale[scale == 0] = 1
    total = np.where(finite, grid / scale[:, None], 0).sum(axis=1)
    mean = np.where(count > 0, total / np.maximum(count, 1) * scale, math.nan)
    middle = np.minimum(begins + grid.shape[1] // 2, len(series) - 1)
    return {"x": series.x[middle].tolist(), "y": _numbers(mean), "t": _numbers(time[middle])}


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    """Round to eight significant digits, more than a curve can show; values that are not finite are None."""
    return [float(f"{v:.8g}") if math.isfinite(v) else None for v in values.tolist()]


def _said_number(value: float) -> str:
    return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _curves(
    views: Sequence[RunView], clocks: Sequence[Clock], names: Sequence[str], metrics: Sequence[str], most: int
) -> list[dict[str, Any]]:
    several = len(views) > 1
    curves = []
    for i, view in enumerate(views):
        for j, metric in enumerate(sorted(metrics, key=_splits_last)):
            if not len(view.points.get(metric, ())):
                continue
            label = f"{names[i]} · {metric}" if several and len(metrics) > 1 else names[i]
            curves.append({
                **_curve(view.points[metric], clocks[i], most),
                "run": i,
                "name": escape(label if several else metric),  # Plotly interprets tags in its texts
                "color": i if several else j,
                "dash": j if several else 0,
            })  # fmt: skip
    return curves


def _dash_note(metrics: Sequence[str]) -> str:
    dashes = zip(sorted(metrics, key=_splits_last), _DASHES, strict=False)
    return ", ".join(f"{metric} {dash}" for metric, dash in dashes) if len(metrics) > 1 else ""


def _splits_last(metric: str) -> tuple[bool, bool, str]:
    return _SPLIT.match(metric) is not None, not metric.startswith("val"), metric


def _device(metric: str) -> str:
    gpu = _GPU.match(metric)
    return f"GPU {gpu[1]}" if gpu else metric


def _marks(view: RunView, clock: Clock, name: str, index: int, *, several: bool) -> list[dict[str, Any]]:
    """The points from which an attempt resumed and at which a batch was left out, for vertical lines."""
    resumed = [a for a in view.attempts if a.resumed_from is not None]
    found = [
        *((a.resumed_from, a.started, f"↻ {a.number}", _resumption(a)) for a in resumed[-_MOST_MARKS:]),
        *((b.step, b.time, "✕", _said_left_out(b)) for b in view.left_out[-_MOST_MARKS:]),
    ]
    return [
        {
            "run": index,
            "x": step,
            "t": _numbers(clock.at(np.array([time])))[0],
            "label": "" if several else label,
            "text": escape(f"{name}: {text}" if several else text),
            "color": index if several else None,
        }
        for step, time, label, text in found
    ]


def _resumption(attempt: AttemptView) -> str:
    at = datetime.fromtimestamp(attempt.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"attempt {attempt.number} resumed from step {attempt.resumed_from} at {at}"


def _said_left_out(batch: LeftOut) -> str:
    back = "" if batch.rewound_to is None else f"; the weights went back to those of step {batch.rewound_to}"
    return f"step {batch.step}: {batch.reason}; its batch was left out{back}"


def _is_histogram(about: Mapping[str, Any]) -> bool:
    """Whether it contains bins: a journal may contain anything."""
    edges, counts = about.get("edges"), about.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or not counts:
        return False
    numbers = all(isinstance(n, int | float) and math.isfinite(n) for n in (*edges, *counts))
    return numbers and len(edges) == len(counts) + 1


def _histogram(media: Media) -> dict[str, Any]:
    """Every histogram that stoker makes has equally wide bins, so its ends determine them all."""
    edges, counts = media.about["edges"], media.about["counts"]
    bad = media.about.get("non_finite")
    return {
        "step": media.step,
        "low": edges[0],
        "high": edges[-1],
        "counts": counts,
        "bad": bad if isinstance(bad, int) else 0,
    }


def spread(found: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spaced, always including the last."""
    if len(found) <= most:
        return list(found)
    if most == 1:
        return [found[-1]]
    return [found[i] for i in dict.fromkeys(np.linspace(0, len(found) - 1, most).astype(int).tolist())]
