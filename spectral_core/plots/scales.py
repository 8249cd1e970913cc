"""Colours, the colour scale, and round numbers for axes.

Shapes: colours are (r, g, b), 0 … 255.
"""

from __future__ import annotations

import math
from functools import lru_cache

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 36, 48)
MUTED: Colour = (98, 106, 120)
GRID: Colour = (229, 231, 236)
EMPTY: Colour = (240, 241, 244)
SERIES: tuple[Colour, ...] = (
    (45, 105, 180),
    (222, 118, 40),
    (40, 148, 104),
    (190, 62, 86),
    (124, 92, 170),
    (20, 150, 170),
    (140, 106, 50),
    (98, 106, 120),
)


@lru_cache(maxsize=1)
def _table() -> tuple[Colour, ...]:
    """256 colours from dark violet to light yellow in even steps of perceived lightness.

    The chroma stays just inside sRGB all along the way, so that the lightness is never clipped.
    """
    colours = []
    for i in range(256):
        t = i / 255
        chroma = 0.114 - 0.034 * math.sin(math.pi * min(1.0, t / 0.9)) + 0.034 * t
        colours.append(_oklch(0.27 + 0.66 * t, chroma, 290 - 187 * t))
    return tuple(colours)


def _oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """OKLCh to sRGB (Ottosson 2020, "A perceptual color space for image processing"); hue in degrees."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    inside = (min(1.0, max(0.0, v)) for v in linear)
    red, green, blue = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in inside)
    return round(255 * red), round(255 * green), round(255 * blue)


def heat(share: float) -> Colour:
    """The colour of a value between 0 (dark blue) and 1 (light yellow)."""
    return _table()[min(255, max(0, round(255 * share)))]


def ink_on(colour: Colour) -> Colour:
    """Dark or white, whichever reads better on a colour, by its relative luminance."""
    red, green, blue = ((v / 255) ** 2.2 for v in colour)
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.3 else PAPER


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About ``count`` round numbers from ≤ low to ≥ high, steps of 1, 2 or 5 · 10^k.

    Of one value alone: from 0 to it, so that a gate that is always open is not drawn on an axis of 1 to 2.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # labels have fewer digits than such a difference
        low, high = min(0.0, low), max(0.0, high) if low or high else 1.0
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(12, 3 - math.floor(math.log10(step)))  # tiny numbers have more of them
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ≤ low to ≥ high; every second, third … where there are many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = max(1, math.ceil((last - first) / 7))
    last = first + stride * math.ceil((last - first) / stride)
    return [10.0**k for k in range(first, last + 1, stride)]


def number(value: float) -> str:
    """A tick's label: at most four digits, powers of ten where plain digits would be long."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
