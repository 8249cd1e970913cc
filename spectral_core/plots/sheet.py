"""Contact sheet: a grid of pictures with labels.

Shapes: pictures are PIL images or tensors (3, H, W) in 0 … 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import SpectralAdapterError
from .canvas import LABEL, MARGIN, Canvas, Heading
from .data import check_labels
from .scales import MUTED
from .text import line_height, text_size, wrap


def contact_sheet(
    rows: Sequence[Sequence[Any]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    cell: int = 192,
) -> Image.Image:
    """A grid of pictures; None leaves a marked gap. Small ones are enlarged by a whole factor to about
    ``cell``.

    Raises:
        SpectralAdapterError: without any picture, for labels that do not match, for tensors of another shape.
    """
    if not rows or not any(picture is not None for row in rows for picture in row):
        raise SpectralAdapterError(
            "no picture for a contact sheet: expected at least one row with one picture"
        )
    check_labels(row_labels, len(rows), "row")
    columns = max(len(row) for row in rows)
    check_labels(column_labels, columns, "column")
    fitted = [[None if p is None else _fit(as_picture(p), cell) for p in row] for row in rows]
    widths = [_most([row[i] for row in fitted if i < len(row)], 0) for i in range(columns)]
    heights = [_most(row, 1) for row in fitted]
    widths, heights = ([length or max(lengths) for length in lengths] for lengths in (widths, heights))
    gap = 8
    names = [wrap(text, LABEL, 134, 4) for text in row_labels]
    side = max((text_size(text, LABEL)[0] + 16 for lines in names for text in lines), default=0)
    labels = [wrap(text, LABEL, width, 3) for text, width in zip(column_labels, widths, strict=False)]
    line = line_height(LABEL)
    sheet_width = 2 * MARGIN + side + sum(widths) + (columns - 1) * gap
    heading = Heading(title, sheet_width)
    head = max((len(lines) for lines in labels), default=0) * line + (8 if labels else 0)
    top = heading.height + head
    lefts = [MARGIN + side + sum(widths[:i]) + i * gap for i in range(columns)]
    tops = [top + sum(heights[:i]) + i * gap for i in range(len(fitted))]
    sheet = Canvas(sheet_width, tops[-1] + heights[-1] + MARGIN)
    heading.draw(sheet)
    for left, width, lines in zip(lefts, widths, labels, strict=False):
        for i, text in enumerate(lines):  # the last line stands on the pictures
            sheet.text(left + width / 2, top - 8 - (len(lines) - i) * line, text, LABEL, MUTED, "mt")
    for index, (row, y, height) in enumerate(zip(fitted, tops, heights, strict=True)):
        lines = names[index] if names else []
        for i, text in enumerate(lines):
            sheet.text(MARGIN, y + height / 2 + (i - len(lines) / 2) * line, text, LABEL)
        for column, (x, width) in enumerate(zip(lefts, widths, strict=True)):
            picture = row[column] if column < len(row) else None
            if picture is None:
                sheet.cross_out((x, y, x + width, y + height))
            else:
                sheet.picture(picture, x + (width - picture.width) // 2, y + (height - picture.height) // 2)
    return sheet.finish()


def _most(pictures: Sequence[Image.Image | None], side: int) -> int:
    """The greatest width (side 0) or height (1); 0 without a picture."""
    return max((picture.size[side] for picture in pictures if picture is not None), default=0)


def as_picture(picture: Any) -> Image.Image:
    """RGB from a PIL image or a tensor (3, H, W), (1, 3, H, W) or (1, H, W) in 0 … 1; values outside are
    clipped.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, Tensor):
        raise SpectralAdapterError(
            f"a {type(picture).__name__} is no picture: expected a PIL image or a tensor"
        )
    values = picture.detach().float().cpu()
    if values.dim() == 4 and values.shape[0] == 1:
        values = values[0]
    if values.dim() != 3 or values.shape[0] not in (1, 3) or not values.numel():
        raise SpectralAdapterError(
            f"a tensor of shape {tuple(picture.shape)} is no picture: expected (3, H, W)"
        )
    if not bool(values.isfinite().all()):
        raise SpectralAdapterError("a picture holds NaN or Inf: the model or the decoder has overflowed")
    bytes_ = (values.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).movedim(0, -1).contiguous()
    return Image.fromarray(bytes_.numpy(), "RGB")


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Enlarged by a whole factor with hard pixels, or reduced smoothly to fit twice the cell."""
    longest, shortest = max(picture.size), min(picture.size)
    if longest > 2 * cell:
        scale = 2 * cell / longest
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.LANCZOS)
    if shortest * 2 <= cell + shortest // 2:  # so that a wide one grows as much as a square one beside it
        factor = max(1, min(round(cell / shortest), 2 * cell // longest))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture
