"""Several plots on one page, under a title and a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from .canvas import LABEL, MARGIN, Canvas, Heading
from .scales import GRID, MUTED
from .text import line_height, wrap

_MIN_WIDTH = 720
_GAP = 4
_MAX_LINES = 16


def page(title: str, lines: Sequence[str], pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in two columns, each put where there is more room; one column where there is only one."""
    columns = _columns(pictures)
    widths = [max(picture.width for picture in column) for column in columns]
    width = max(sum(widths) + _GAP * (len(columns) - 1), _MIN_WIDTH)
    heading = Heading(title, width)
    line = line_height(LABEL)
    shown = [text for given in lines for text in wrap(given, LABEL, width - 2 * MARGIN, 2)][:_MAX_LINES]
    top = heading.height + len(shown) * line + 14
    tall = max((sum(picture.height + _GAP for picture in column) for column in columns), default=0)
    sheet = Canvas(width, top + tall + MARGIN)
    heading.draw(sheet)
    for i, text in enumerate(shown):
        sheet.text(MARGIN, heading.height + i * line, text, LABEL, MUTED)
    sheet.line([(MARGIN, top - 2), (width - MARGIN, top - 2)], GRID)
    x = 0
    for column, column_width in zip(columns, widths, strict=True):
        y = top
        for picture in column:
            sheet.picture(picture, x, y)
            y += picture.height + _GAP
        x += column_width + _GAP
    return sheet.finish()


def _columns(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Two columns of nearly the same height, filled in order."""
    if len(pictures) < 2:
        return [list(pictures)] if pictures else []
    columns: list[list[Image.Image]] = [[], []]
    heights = [0, 0]
    for picture in pictures:
        shorter = 0 if heights[0] <= heights[1] else 1
        columns[shorter].append(picture)
        heights[shorter] += picture.height + _GAP
    return columns
