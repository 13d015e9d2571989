"""Curves as a picture, for pages that run no scripts, such as a model card on the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.report import facts, plots
from stoker.run.series import Series

_SIZE = (900, 420)
_SCALE = 2  # drawn larger and scaled down, which smooths the lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 45
_COLOURS = ("#4269d0", "#ff725c", "#6cc5b0", "#efb118")
_INK, _GRID = "#444444", "#e3e3e3"

Point = tuple[float, float]


def draw(curves: Mapping[str, Series], file: Path) -> bool:
    """Draw curves by step into a PNG file; returns False and writes no file if there is no finite point.

    Args:
        curves: by name; each gets its own colour.
    """
    points = {name: _finite(series) for name, series in curves.items()}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return False
    from PIL import Image, ImageDraw, ImageFont

    width, height = (_SCALE * side for side in _SIZE)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13 * _SCALE)
    every = [point for found in points.values() for point in found]
    place = _Place(every)
    for value in _ticks(place.bottom, place.top):
        y = place.y(value)
        pen.line([(place.left, y), (place.right, y)], _GRID, _SCALE)
        pen.text((place.left - 8 * _SCALE, y), facts.number(value), _INK, font, anchor="rm")
    for step in _ticks(place.first, place.last):
        pen.text((place.x(step), place.floor + 8 * _SCALE), facts.number(step), _INK, font, anchor="ma")
    pen.text((place.right, place.floor + 26 * _SCALE), "step", _INK, font, anchor="ra")
    at = float(place.left)
    for (name, found), colour in zip(points.items(), _COLOURS, strict=False):
        line = [(place.x(step), place.y(value)) for step, value in found]
        if len(line) > 1:
            pen.line(line, colour, 2 * _SCALE, joint="curve")
        _dots(pen, line if len(line) < 40 else [], colour)
        pen.line([(at, 20 * _SCALE), (at + 24 * _SCALE, 20 * _SCALE)], colour, 3 * _SCALE)
        pen.text((at + 30 * _SCALE, 20 * _SCALE), name, _INK, font, anchor="lm")
        at += 60 * _SCALE + pen.textlength(name, font)
    image.resize(_SIZE, Image.Resampling.LANCZOS).save(file, optimize=True)
    return True


class _Place:
    """The positions of points on the picture."""

    def __init__(self, points: Sequence[Point]) -> None:
        steps, values = zip(*points, strict=True)
        self.first, self.last = min(steps), max(steps)
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        self.bottom, self.top = low - room, high + room
        self.left, self.right = _LEFT * _SCALE, (_SIZE[0] - _RIGHT) * _SCALE
        self.floor, self._ceiling = (_SIZE[1] - _BOTTOM) * _SCALE, _TOP * _SCALE

    def x(self, step: float) -> float:
        share = (step - self.first) / ((self.last - self.first) or 1.0)
        return float(self.left + share * (self.right - self.left))

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return float(self.floor - share * (self.floor - self._ceiling))


def _dots(pen: Any, line: Sequence[Point], colour: str) -> None:
    radius = 3 * _SCALE
    for x, y in line:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _finite(series: Series) -> list[Point]:
    kept = plots.thinned(series.y)
    pairs = zip(series.x[kept].tolist(), series.y[kept].tolist(), strict=True)
    return [(float(x), y) for x, y in pairs if math.isfinite(y)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two numbers."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]
