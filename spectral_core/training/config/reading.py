"""A setting's value from text, as a command line, a configuration file or a node's widget has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import SpectralAdapterError
from .setting import Setting

MOST_COLUMNS = 4096
MOST_PIXELS = 16_384  # of a side
_COLUMNS = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")


def reader_of(row: Setting) -> Callable[[str], Any]:
    """What reads one value of the setting (of a tuple of texts: one of its texts)."""
    if row.kind is not tuple:
        return row.kind
    if row.item is int:
        return size if row.length else columns
    return pair if row.item is float else str


def columns(text: str) -> tuple[int, ...]:
    """``0-7`` or ``0,2,4`` or both; nothing for empty text."""
    found: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _COLUMNS.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < MOST_COLUMNS:
            raise SpectralAdapterError(f"columns {text!r:.80}: expected something like 0-7 or 0,2,4")
        found += range(first, last + 1)
        if len(found) > MOST_COLUMNS:
            raise SpectralAdapterError(f"columns {text!r:.80}: at most {MOST_COLUMNS} are trained")
    return tuple(found)


def size(text: str) -> tuple[int, int]:
    """``512`` or ``768x512``, width first."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    sides = (width.strip(), (height or width).strip())
    if not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        raise SpectralAdapterError(f"size {text!r:.80}: expected pixels, like 512 or 768x512")
    found = int(sides[0]), int(sides[1])
    if not all(8 <= side <= MOST_PIXELS for side in found):
        raise SpectralAdapterError(f"size {text!r:.80}: expected 8 to {MOST_PIXELS} pixels a side")
    return found


def pair(text: str) -> tuple[float, float]:
    """``0.9,0.99``."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise SpectralAdapterError(f"{text!r}: expected two numbers, like 0.9,0.99") from None
    return first, second
