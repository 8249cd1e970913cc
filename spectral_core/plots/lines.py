"""Line plot, with round axis numbers and a legend.

Shapes: a series is its y values over 0, 1, 2, … or a pair (x values, y values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..errors import SpectralAdapterError
from .canvas import LABEL, MARGIN, SMALL, Canvas, Heading
from .data import finite
from .scales import GRID, INK, MUTED, SERIES, Colour, heat, log_ticks, number, ticks
from .text import line_height, shorten, text_size

Points = list[tuple[float, float]]
_LEGEND_WIDTH = 240


def line_plot(
    series: Mapping[str, Any],
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    width: int = 960,
    height: int = 540,
    y_range: tuple[float, float] | None = None,
) -> Image.Image:
    """One line for each name; missing values break it, a lone point is a dot.

    The y axis shows at least ``y_range``, else about what there is. On a logarithmic axis values ≤ 0 count as
    missing. Raises where nothing can be drawn or lengths differ.
    """
    lines = {name: _points(name, values, log_x, log_y) for name, values in series.items()}
    known = [p for points in lines.values() for p in points if not math.isnan(p[0] + p[1])]
    if not known:
        hint = "; on a logarithmic axis only values above 0 count" if log_x or log_y else ""
        raise SpectralAdapterError(f"no finite point in {len(lines)} series: nothing to draw{hint}")
    x_axis, y_axis = (
        _Axis([p[0] for p in known], log_x, snug=True),
        _Axis([*(p[1] for p in known), *(y_range or ())], log_y),
    )
    named = [shorten(name, SMALL, _LEGEND_WIDTH) for name in lines] if any(lines) else []
    legend = max((text_size(name, SMALL)[0] + 54 for name in named), default=0)
    heading = Heading(title, width)
    line = line_height(SMALL)
    below = line + 12 + (line_height(LABEL) if x_label else 0)
    left = MARGIN + (26 if y_label else 0) + max(text_size(t, SMALL)[0] for t in y_axis.labels) + 10
    right = width - MARGIN - max(legend, text_size(x_axis.labels[-1], SMALL)[0] / 2)
    top = heading.height + line / 2
    height = max(height, math.ceil(top + len(named) * (line + 5) + below + MARGIN))
    box = (left, top, right, height - MARGIN - below)
    sheet = Canvas(width, height)
    heading.draw(sheet)
    _draw_axes(sheet, box, x_axis, y_axis)
    sheet.axis_titles(box, x_label, y_label, line + 12)
    for index, points in enumerate(lines.values()):
        _draw_line(sheet, points, _colour(index, len(lines)), box, x_axis, y_axis)
    for index, name in enumerate(named):
        y = top + index * (line + 5) + line / 2
        sheet.line([(right + 20, y), (right + 42, y)], _colour(index, len(lines)), 3)
        sheet.text(right + 50, y, name, SMALL, INK, "lm")
    return sheet.finish()


def _points(name: str, values: Any, log_x: bool, log_y: bool) -> Points:
    pair = isinstance(values, tuple) and len(values) == 2 and all(hasattr(v, "__len__") for v in values)
    xs, ys = values if pair else (range(len(values)), values)
    if len(xs) != len(ys):
        raise SpectralAdapterError(f"series {name!r}: {len(xs)} x values for {len(ys)} y values")
    return [(_on_axis(x, log_x), _on_axis(y, log_y)) for x, y in zip(xs, ys, strict=True)]


def _on_axis(value: Any, log: bool) -> float:
    number = finite(value)
    return math.nan if log and number <= 0 else number


class _Axis:
    """Round numbers over a range, and where a value lies between the first and the last, 0 … 1."""

    def __init__(self, values: Sequence[float], log: bool, snug: bool = False) -> None:
        low, high = min(values), max(values)
        self.log = log
        self.ticks = log_ticks(low, high) if log else ticks(low, high)
        self.low, self.high = self.ticks[0], self.ticks[-1]
        if snug and not log and high > low:  # the data fills the width
            self.low, self.high = low, high
            slack = 1e-9 * (high - low)
            self.ticks = [t for t in self.ticks if low - slack <= t <= high + slack] or [low, high]
        self.labels = [number(t) for t in self.ticks]

    def share(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return (value - low) / (high - low)


def _draw_axes(sheet: Canvas, box: tuple[float, float, float, float], x_axis: _Axis, y_axis: _Axis) -> None:
    left, top, right, bottom = box
    for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        y = bottom - (bottom - top) * y_axis.share(tick)
        sheet.line([(left, y), (right, y)], GRID)
        sheet.text(left - 10, y, label, SMALL, MUTED, "rm")
    sheet.line([(left, bottom), (right, bottom)], MUTED)
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        x = left + (right - left) * x_axis.share(tick)
        sheet.line([(x, bottom), (x, bottom + 5)], MUTED)
        sheet.text(x, bottom + 8, label, SMALL, MUTED, "mt")


def _draw_line(
    sheet: Canvas,
    points: Points,
    colour: Colour,
    box: tuple[float, float, float, float],
    x_axis: _Axis,
    y_axis: _Axis,
) -> None:
    left, top, right, bottom = box
    run: Points = []
    for x, y in [*points, (math.nan, math.nan)]:
        if not math.isnan(x + y):
            run.append((left + (right - left) * x_axis.share(x), bottom - (bottom - top) * y_axis.share(y)))
            continue
        if len(run) > 1:
            sheet.line(run, colour, 2)
        if run and len(run) <= 24:
            for point in run:
                sheet.dot(*point, 3, colour)
        run = []


def _colour(index: int, count: int) -> Colour:
    """Distinct colours for a few series, steps of the colour scale for many."""
    return SERIES[index] if count <= len(SERIES) else heat(0.05 + 0.8 * index / (count - 1))
