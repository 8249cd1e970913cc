"""Paper and pen for the plots: smooth shapes and sharp text with Pillow alone (hosts ship no matplotlib).

Shapes are drawn at twice the size and reduced; pictures and text go on top at their own size. Every text's
box must lie on the canvas, which :meth:`Canvas.finish` checks; the picture's ``info["labels"]`` lists them.

Shapes: everything is in pixels, (x, y) from the top left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .scales import EMPTY, INK, MUTED, PAPER, Colour
from .text import drawable, shorten, text_size, wrap

Box = tuple[float, float, float, float]

MARGIN = 24
TITLE = 22
LABEL = 15
SMALL = 13
_SMOOTH = 2


class Canvas:
    """A white sheet of ``width`` × ``height`` pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.size = (math.ceil(width), math.ceil(height))
        self._shapes = Image.new("RGB", (self.size[0] * _SMOOTH, self.size[1] * _SMOOTH), PAPER)
        self._pen = ImageDraw.Draw(self._shapes)
        self._pictures: list[tuple[Image.Image, tuple[int, int]]] = []
        self._texts: list[tuple[str, Box, int, Colour, bool]] = []

    def rectangle(self, box: Box, fill: Colour | None = None, outline: Colour | None = None) -> None:
        x0, y0, x1, y1 = (round(v * _SMOOTH) for v in box)
        if x1 > x0 and y1 > y0:
            self._pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill, outline, _SMOOTH if outline else 1)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1.0) -> None:
        scaled = [(x * _SMOOTH, y * _SMOOTH) for x, y in points]
        self._pen.line(scaled, colour, max(1, round(width * _SMOOTH)), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = tuple(v * _SMOOTH for v in (x - radius, y - radius, x + radius, y + radius))
        self._pen.ellipse(box, colour)

    def cross_out(self, box: Box) -> None:
        """Mark a place without a value."""
        self.rectangle(box, EMPTY)
        x0, y0, x1, y1 = box
        reach = max(2.0, min(x1 - x0, y1 - y0, 24) / 4)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        for sign in (1, -1):
            self.line([(x - reach, y - sign * reach), (x + reach, y + sign * reach)], (176, 181, 191), 1)

    def picture(self, image: Image.Image, x: float, y: float) -> None:
        self._pictures.append((image, (round(x), round(y))))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        colour: Colour = INK,
        anchor: str = "lt",
        upright: bool = False,
    ) -> None:
        """anchor: l, m, r and t, m, b: which point of the text's box (x, y) is; upright: read from below."""
        width, height = text_size(text, size)
        if upright:
            width, height = height, width
        left = x - {"l": 0.0, "m": width / 2, "r": float(width)}[anchor[0]]
        top = y - {"t": 0.0, "m": height / 2, "b": float(height)}[anchor[1]]
        left, top = round(left), round(top)
        self._texts.append((text, (left, top, left + width, top + height), size, colour, upright))

    def axis_titles(self, box: Box, x_label: str, y_label: str, below: float) -> None:
        """The labels of a plot in ``box``: ``below`` pixels under it, and upright at the left margin."""
        left, top, right, bottom = box
        if x_label:
            shown = shorten(x_label, LABEL, right - left)
            self.text((left + right) / 2, bottom + below, shown, LABEL, MUTED, "mt")
        if y_label:
            shown = shorten(y_label, LABEL, bottom - top)
            self.text(MARGIN, (top + bottom) / 2, shown, LABEL, MUTED, "lm", upright=True)

    def finish(self) -> Image.Image:
        """The picture; its ``info["labels"]`` holds (text, box) of everything written."""
        sheet = self._shapes.reduce(_SMOOTH)
        for image, place in self._pictures:
            sheet.paste(image, place)
        pen = ImageDraw.Draw(sheet)
        for text, box, size, colour, upright in self._texts:
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= self.size[0] and box[3] <= self.size[1], (
                text,
                box,
            )
            font, shown = drawable(text, size)
            if not upright:
                pen.text(box[:2], shown, colour, font)
                continue
            width, height = text_size(text, size)
            mask = Image.new("L", (width, height), 0)
            ImageDraw.Draw(mask).text((0, 0), shown, 255, font)
            sheet.paste(colour, (int(box[0]), int(box[1])), mask.rotate(90, expand=True))
        sheet.info["labels"] = tuple((text, box) for text, box, *_ in self._texts)
        return sheet


class Heading:
    """A title of up to two lines with an optional note below, at the top left."""

    def __init__(self, title: str, width: float, note: str = "") -> None:
        room = width - 2 * MARGIN
        self._lines = [(text, TITLE, INK) for text in (wrap(title, TITLE, room, 2) if title else [])]
        self._lines += [(text, SMALL, MUTED) for text in (wrap(note, SMALL, room, 2) if note else [])]
        used = sum(text_size(text, size)[1] + 2 for text, size, _ in self._lines)
        self.height = MARGIN + used + (14 if self._lines else 0)

    def draw(self, sheet: Canvas) -> None:
        y = float(MARGIN) - 4
        for text, size, colour in self._lines:
            sheet.text(MARGIN, y, text, size, colour)
            y += text_size(text, size)[1] + 2
