"""Fonts and lines of text: what a text measures, and how it is made to fit.

Pillow's own font has no Greek and no accents; a text with such letters takes the first system font that has
them, and where there is none it is put into plain letters.

Sizes are in pixels.
"""

from __future__ import annotations

import contextlib
import math
import unicodedata
from functools import lru_cache
from typing import Any

from PIL import ImageFont

_SYSTEM_FONTS = (
    "DejaVuSans.ttf", "segoeui.ttf", "Arial.ttf", "arial.ttf", "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "msyh.ttc", "PingFang.ttc", "NotoSansCJK-Regular.ttc", "meiryo.ttc", "malgun.ttf",
)  # fmt: skip
_PLAIN = {
    "Δ": "d", "σ": "sigma", "Σ": "sum", "λ": "lambda", "α": "alpha", "→": "->", "–": "-", "—": "-", "−": "-",
    "×": "x", "…": "...", "’": "'", "≤": "<=", "≥": ">=", "‖": "|",
}  # fmt: skip


@lru_cache(maxsize=64)
def _fonts(size: int) -> tuple[Any, ...]:
    """Pillow's own font first, then what the system has; at worst Pillow's small bitmap font."""
    fonts: list[Any] = []
    with contextlib.suppress(TypeError):  # Pillow < 10.1: its built-in font has one size
        fonts.append(ImageFont.load_default(size))
    for name in _SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except (OSError, ImportError):  # not installed, or Pillow without FreeType
            continue
    return tuple(fonts) or (ImageFont.load_default(),)


@lru_cache(maxsize=4096)
def _has(font: Any, letter: str) -> bool:
    """Whether the font draws this letter as something else than its sign for a missing one."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return ord(letter) < 256
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


@lru_cache(maxsize=4096)
def drawable(text: str, size: int) -> tuple[Any, str]:
    """The first font that has every letter, or the first font and the text put into plain letters."""
    text = " ".join(text.split())
    for font in _fonts(size):
        if all(_has(font, letter) for letter in text):
            return font, text
    font = _fonts(size)[0]
    plain = unicodedata.normalize("NFKD", "".join(_PLAIN.get(c, c) for c in text))
    kept = (c for c in plain if not unicodedata.combining(c))
    return font, "".join(c if _has(font, c) else "?" for c in kept)


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and line height of one line."""
    font, shown = drawable(text, size)
    if isinstance(font, ImageFont.FreeTypeFont):
        return math.ceil(font.getlength(shown)), sum(font.getmetrics())
    box = font.getbbox(shown)
    return math.ceil(box[2]), math.ceil(font.getbbox("Ag")[3])


def line_height(size: int) -> int:
    return text_size("Ag", size)[1]


def shorten(text: str, size: int, width: float) -> str:
    """The text with its middle replaced by … where it would be wider than ``width``."""
    if text_size(text, size)[0] <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        tail = math.ceil(kept * 0.6)  # a layer's name says most at its end
        shown = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if text_size(shown, size)[0] <= width:
            return shown
    return "…"


def wrap(text: str, size: int, width: float, lines: int) -> list[str]:
    """The text in at most ``lines`` lines of ``width``; the last one shortened at its end."""
    words, broken = text.split(), [""]
    for index, word in enumerate(words):
        longer = f"{broken[-1]} {word}".strip()
        if text_size(longer, size)[0] <= width or not broken[-1]:
            broken[-1] = longer
        elif len(broken) < lines:
            broken.append(word)
        else:
            broken[-1] = _cut(" ".join([broken[-1], *words[index:]]), size, width)
            break
    return [shorten(line, size, width) for line in broken]


def _cut(text: str, size: int, width: float) -> str:
    while text and text_size(f"{text}…", size)[0] > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
