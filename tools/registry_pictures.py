"""Draws ``docs/icon.png`` and ``docs/banner.png``, which the Comfy registry shows: ``python -m
tools.registry_pictures``.

Both show what the adapters work on: the singular values of a weight, of which the largest are changed, and a
wave, the frequency domain. The icon is 400 × 400 pixels, the banner 1260 × 540 (21:9), as the registry asks.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
FINER = 4  # drawn larger and made smaller, for smooth edges
GROUND, TOP, MUTED, WAVE, WORDS, QUIET = "#12151d", "#1d2333", "#3a4663", "#7fd6e8", "#f4f1ea", "#a9b4cc"
WARM = ((255, 196, 92), (240, 92, 92))  # the changed columns, from the largest on

Box = tuple[float, float, float, float]


def mixed(share: float) -> tuple[int, int, int]:
    first, last = WARM
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return red, green, blue


def ground(width: int, height: int) -> Image.Image:
    """Dark, a little lighter towards the top."""
    shade = Image.linear_gradient("L").resize((width, height))
    return Image.composite(Image.new("RGB", shade.size, GROUND), Image.new("RGB", shade.size, TOP), shade)


def spectrum(picture: Image.Image, box: Box, count: int, changed: int, wave: float) -> None:
    """``count`` bars that fall like singular values, ``changed`` of them coloured, and a wave over them."""
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    step = (right - left) / count
    for i in range(count):
        size = math.exp(-2.4 * i / count)
        x, y = left + i * step + 0.14 * step, bottom - (bottom - top) * size
        fill = mixed(i / max(changed - 1, 1)) if i < changed else MUTED
        draw.rounded_rectangle((x, y, x + 0.72 * step, bottom), radius=0.2 * step, fill=fill)
    radius = 0.0135 * (bottom - top)
    for k in range(2001):  # round dots side by side: a wide line of this kind has ragged edges
        at = k / 2000
        swing = 0.2 * math.exp(-1.1 * at) * math.cos(2 * math.pi * wave * at)
        x, y = left + at * (right - left), bottom - (bottom - top) * (0.46 - 0.2 * at + swing)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=WAVE)


def icon() -> Image.Image:
    side = 400 * FINER
    picture = ground(side, side)
    spectrum(picture, (0.14 * side, 0.16 * side, 0.86 * side, 0.84 * side), 7, 3, 1.5)
    return picture.resize((400, 400), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = 1260 * FINER, 540 * FINER
    picture = ground(width, height)
    spectrum(picture, (0.6 * width, 0.17 * height, 0.95 * width, 0.83 * height), 16, 6, 2.5)
    draw = ImageDraw.Draw(picture)
    lines = [
        (0.3, 0.13, "Spectral Adapters", WORDS),
        (0.52, 0.058, "FouRA and Spectral Adapter for ComfyUI:", QUIET),
        (0.61, 0.058, "train, combine and share small adapters", QUIET),
    ]
    for place, size, text, colour in lines:
        font = ImageFont.load_default(size * height)
        draw.text((0.06 * width, place * height), text, fill=colour, font=font)
    return picture.resize((1260, 540), Image.Resampling.LANCZOS)


def main() -> None:
    for name, picture in (("icon.png", icon()), ("banner.png", banner())):
        picture.save(DOCS / name, optimize=True)
        print(f"{DOCS / name}: {picture.size[0]} × {picture.size[1]}")


if __name__ == "__main__":
    main()
