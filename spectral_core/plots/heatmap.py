"""Heatmap: a matrix in colours, with its values where they fit, and the colour scale beside it.

Shapes: matrix rows × columns; rows are typically layers, columns noise levels or concepts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import SpectralAdapterError
from .canvas import LABEL, MARGIN, SMALL, Canvas, Heading
from .data import check_labels, finite, mean
from .scales import GRID, INK, MUTED, heat, ink_on, number, ticks
from .text import line_height, shorten, text_size, wrap

MAX_ROWS = 120
MAX_COLUMNS = 80
_LABEL_WIDTH = 300
_SHORT = (
    (r"\bunet\.", ""),
    (r"\btext_encoder", "te"),
    (r"\btext_model\.encoder\.layers\.", ""),
    (r"\b(down|up)_blocks\.", r"\1"),
    (r"\bmid_block\b", "mid"),
    (r"\battentions\.", "at"),
    (r"\btransformer_blocks\.", "tb"),
    (r"\bresnets\.", "res"),
    (r"\bself_attn\.", ""),
    (r"\bto_out\.0\b", "to_out"),
)


def abbreviate(name: str) -> str:
    """A layer's name in the short words that are usual: ``down0.at1.tb0.attn2.to_q``; others stay as they
    are.
    """
    for pattern, short in _SHORT:
        name = re.sub(pattern, short, name)
    return name


def heatmap(
    matrix: Any,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    value_format: str = "{:.3g}",
    legend: str = "",
    x_label: str = "",
    y_label: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Image.Image:
    """Colours from ``low`` to ``high`` (the smallest and largest value by default); missing values are
    crossed out.

    legend names the colour scale, which starts at 0 where the values nearly do. More than 120 rows or 80
    columns are averaged in groups of neighbours, and above 64 rows the numbers are left out.

    Raises for an empty or ragged matrix, for one without any number, and for labels that do not match.
    """
    values, rows, columns = _checked(matrix, row_labels, column_labels)
    values, rows, columns, note = _grouped(values, rows, columns)
    known = [v for row in values for v in row if not math.isnan(v)]
    high = max(known) if high is None else high
    if low is None:  # a scale that nearly starts at 0 does
        low = 0.0 if 0 <= min(known) <= 0.15 * high else min(known)
    grid = _Grid(values, rows, columns, value_format, bool(x_label), bool(y_label))
    scale = _scale_ticks(low, high)
    scale_width = 14 + 8 + max(text_size(_end(v), SMALL)[0] for v in scale)
    legend_lines = shorten(legend, SMALL, 200) if legend else ""
    beside = 28 + max(scale_width, text_size(legend_lines, SMALL)[0])
    width = max(2 * MARGIN + grid.left + grid.width + beside, 420)
    heading = Heading(title, width, note)
    tall = max(grid.height, 140 if high > low else 34)
    height = heading.height + grid.top + max(tall, grid.height + grid.bottom) + MARGIN
    sheet = Canvas(width, height)
    heading.draw(sheet)
    x, y = MARGIN + grid.left, heading.height + grid.top
    grid.draw(sheet, x, y, low, high)
    sheet.axis_titles((x, y, x + grid.width, y + grid.height), x_label, y_label, 10)
    _draw_scale(sheet, x + grid.width + 28, y, min(tall, 320), scale, legend_lines)
    return sheet.finish()


def _checked(
    matrix: Any, row_labels: Sequence[str], column_labels: Sequence[str]
) -> tuple[list[list[float]], list[str], list[str]]:
    rows = matrix.tolist() if hasattr(matrix, "tolist") else matrix
    lengths = {len(row) if isinstance(row, Sequence) else 0 for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise SpectralAdapterError("an empty or ragged matrix: expected rows of one length ≥ 1 for a heatmap")
    values = [[finite(v) for v in row] for row in rows]
    if all(math.isnan(v) for row in values for v in row):
        raise SpectralAdapterError("a matrix without a single finite number: nothing to draw in a heatmap")
    check_labels(row_labels, len(values), "row")
    check_labels(column_labels, len(values[0]), "column")
    return values, [abbreviate(label) for label in row_labels], list(column_labels)


def _grouped(
    values: list[list[float]], rows: list[str], columns: list[str]
) -> tuple[list[list[float]], list[str], list[str], str]:
    """Means over groups of neighbours where there is too much to show, and a note that says so."""
    by_row, by_column = math.ceil(len(values) / MAX_ROWS), math.ceil(len(values[0]) / MAX_COLUMNS)
    if by_row == by_column == 1:
        return values, rows, columns, ""
    at_rows, at_columns = range(0, len(values), by_row), range(0, len(values[0]), by_column)
    means = [
        [mean([v for row in values[r : r + by_row] for v in row[c : c + by_column]]) for c in at_columns]
        for r in at_rows
    ]
    rows = [_group_label(rows[r : r + by_row]) for r in at_rows] if rows else rows
    columns = [_group_label(columns[c : c + by_column]) for c in at_columns] if columns else columns
    sizes = " and ".join(f"{n} {what}" for n, what in ((by_row, "rows"), (by_column, "columns")) if n > 1)
    return means, rows, columns, f"Each cell is the mean over up to {sizes}."


def _group_label(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} +{len(labels) - 1}"


class _Grid:
    """Sizes of the cells and of the labels around them, and how they are drawn."""

    def __init__(
        self,
        values: list[list[float]],
        rows: list[str],
        columns: list[str],
        form: str,
        below: bool,
        beside: bool,
    ) -> None:
        self.values, count, across = values, len(values), len(values[0])
        self.texts = [["" if math.isnan(v) else form.format(v) for v in row] for row in values]
        longest = max(text_size(text, SMALL)[0] for row in self.texts for text in row)
        line = line_height(SMALL)
        self.cell_height = 34 if count <= 12 else 26 if count <= 30 else line
        self.cell_width = min(max(longest + 12, 40 if across <= 24 else 18), 110)
        if across * self.cell_width > 1100:
            self.cell_width = max(1100 // across, 12)
        if across * self.cell_width < 160:
            self.cell_width = min(160 // across, 110)
        self.rows = [shorten(label, SMALL, _LABEL_WIDTH) for label in rows]
        widest = max((text_size(label, SMALL)[0] for label in columns), default=0)
        if across <= 10:
            self.cell_width = min(max(self.cell_width, widest + 16), max(self.cell_width, 130))
        self.written = longest + 6 <= self.cell_width and count <= 64
        self.upright = widest + 8 > self.cell_width and across > 10
        if self.upright:
            self.columns = [[shorten(label, SMALL, 160)] for label in columns]
            self.top = min(widest, 160)
        else:
            self.columns = [wrap(label, SMALL, self.cell_width - 8, 3) for label in columns]
            self.top = max((len(lines) for lines in self.columns), default=0) * line
        self.top += 8 if columns else 0
        self.left = max((text_size(label, SMALL)[0] + 10 for label in self.rows), default=0) + (
            28 if beside else 0
        )
        self.bottom = 10 + line_height(LABEL) if below else 0
        self.width, self.height = self.cell_width * across, self.cell_height * count

    def draw(self, sheet: Canvas, x: float, y: float, low: float, high: float) -> None:
        for r, row in enumerate(self.values):
            top = y + r * self.cell_height
            if self.rows:
                sheet.text(x - 10, top + self.cell_height / 2, self.rows[r], SMALL, INK, "rm")
            for c, value in enumerate(row):
                left = x + c * self.cell_width
                box = (left, top, left + self.cell_width, top + self.cell_height)
                if math.isnan(value):
                    sheet.cross_out(box)
                    continue
                colour = heat((value - low) / (high - low) if high > low else 0.5)
                sheet.rectangle(box, colour)
                if self.written:
                    x_middle, y_middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    sheet.text(x_middle, y_middle, self.texts[r][c], SMALL, ink_on(colour), "mm")
        for c, lines in enumerate(self.columns):
            middle = x + (c + 0.5) * self.cell_width
            for i, text in enumerate(reversed(lines)):
                bottom = y - 8 - i * line_height(SMALL)
                sheet.text(middle, bottom, text, SMALL, MUTED, "mb", upright=self.upright)


def _scale_ticks(low: float, high: float) -> list[float]:
    """The ends and the round numbers between them that are not crowded by an end."""
    if high <= low:
        return [low]
    room = (high - low) * 0.14
    return [low, *(v for v in ticks(low, high, 5) if low + room < v < high - room), high]


def _end(value: float) -> str:
    """The label of a place on the colour scale, three digits."""
    return number(float(f"{value:.3g}"))


def _draw_scale(sheet: Canvas, x: float, y: float, height: float, scale: list[float], legend: str) -> None:
    low, high = scale[0], scale[-1]
    line = line_height(SMALL)
    if legend:
        sheet.text(x, y - 4, legend, SMALL, MUTED)
        y, height = y + line + 6, height - line - 6
    height -= line / 2
    y += line / 2 - 4 if not legend else 4
    if high <= low:
        sheet.rectangle((x, y, x + 14, y + 14), heat(0.5))
        sheet.text(x + 22, y + 7, _end(low), SMALL, INK, "lm")
        return
    steps = int(height)
    for i in range(steps):
        sheet.rectangle(
            (x, y + i * height / steps, x + 14, y + (i + 1) * height / steps), heat(1 - i / (steps - 1))
        )
    for value in scale:
        at = y + height * (1 - (value - low) / (high - low))
        sheet.line([(x + 14, at), (x + 18, at)], GRID if low < value < high else MUTED)
        sheet.text(x + 22, at, _end(value), SMALL, INK, "lm")
