"""Simple places instead of a plain background: a meadow, a beach, the night, snow, a room.

Shapes: a ground is a (pixels, pixels, 3) float32 canvas for ``draw`` to paint on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .draw import SIZE, Array, Points, _box, _ellipse, _paint, _tone, polygon_mask

PHRASES = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "night": "at night",
    "snow": "in the snow",
    "room": "in a room",
}
ALIKE = {("green", "meadow"), ("yellow", "beach"), ("white", "snow")}
"""Colours that a ground nearly has itself: no object of theirs is drawn on it."""


def _sky(
    top: tuple[int, int, int], low: tuple[int, int, int], rng: np.random.Generator, pixels: int
) -> Array:
    ramp = np.linspace(0, 1, pixels, dtype=np.float32)[:, None, None]
    column = _tone(top, rng) * (1 - ramp) + _tone(low, rng) * ramp
    return np.broadcast_to(column, (pixels, pixels, 3)).copy()


def _fill(canvas: Array, shapes: list[Points], tone: Array) -> Array:
    return _paint(canvas, polygon_mask([(points, 255) for points in shapes], len(canvas)), tone)


def _hill(level: float, height: float, rng: np.random.Generator) -> Points:
    x = np.linspace(-2, SIZE + 2, 40)
    y = level + height * np.sin(x / SIZE * np.pi * rng.uniform(0.8, 1.8) + rng.uniform(0, 2 * np.pi))
    ridge = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    return [*ridge, (SIZE + 2.0, SIZE + 2.0), (-2.0, SIZE + 2.0)]


def _spots(
    count: int, top: float, bottom: float, size: tuple[float, float], rng: np.random.Generator
) -> list[Points]:
    return [
        _ellipse(float(rng.uniform(1, SIZE - 1)), float(rng.uniform(top, bottom)), r, r)
        for r in rng.uniform(*size, count).tolist()
    ]


def _meadow(rng: np.random.Generator, pixels: int) -> Array:
    canvas, level = _sky((118, 182, 236), (206, 230, 246), rng, pixels), float(rng.uniform(38, 46))
    for _ in range(int(rng.integers(1, 3))):
        x, y = float(rng.uniform(6, 58)), float(rng.uniform(5, 18))
        cloud = [_ellipse(x + dx, y + abs(dx) / 6, 5.0, 2.8) for dx in (-5, 0, 5)]
        canvas = _fill(canvas, cloud, _tone((248, 250, 252), rng))
    canvas = _fill(canvas, [_hill(level, 2.5, rng)], _tone((112, 178, 84), rng))
    canvas = _fill(canvas, [_hill(level + 12, 2.0, rng)], _tone((88, 152, 66), rng))
    return _fill(canvas, _spots(9, level + 5, 63, (0.6, 1.0), rng), _tone((250, 240, 140), rng))


def _beach(rng: np.random.Generator, pixels: int) -> Array:
    canvas, level = _sky((134, 196, 240), (226, 240, 246), rng, pixels), float(rng.uniform(26, 32))
    canvas = _fill(canvas, [_box(-2, level, SIZE + 2, SIZE + 2)], _tone((38, 128, 176), rng))
    for y in (level + 3.5, level + 8):
        x = float(rng.uniform(2, 30))
        canvas = _fill(
            canvas,
            [_box(x, y, x + 14, y + 0.8), _box(x + 22, y + 1.5, x + 30, y + 2.3)],
            _tone((150, 206, 226), rng),
        )
    canvas = _fill(canvas, [_hill(level + 15, 1.5, rng)], _tone((232, 208, 152), rng))
    return _fill(canvas, _spots(10, level + 19, 63, (0.4, 0.8), rng), _tone((192, 160, 106), rng))


def _night(rng: np.random.Generator, pixels: int) -> Array:
    canvas = _sky((14, 16, 48), (50, 48, 104), rng, pixels)
    canvas = _fill(canvas, _spots(18, 2, 44, (0.4, 0.8), rng), _tone((240, 240, 214), rng))
    return _fill(canvas, [_hill(float(rng.uniform(46, 52)), 3.0, rng)], _tone((22, 30, 44), rng))


def _snow(rng: np.random.Generator, pixels: int) -> Array:
    canvas, level = _sky((146, 164, 186), (190, 202, 216), rng, pixels), float(rng.uniform(42, 48))
    canvas = _fill(canvas, [_hill(level, 2.5, rng)], _tone((234, 240, 246), rng))
    return _fill(canvas, _spots(20, 1, 60, (0.5, 1.1), rng), _tone((250, 252, 254), rng))


def _room(rng: np.random.Generator, pixels: int) -> Array:
    level = float(rng.uniform(44, 48))
    canvas = _sky((226, 208, 178), (214, 194, 162), rng, pixels)
    canvas = _fill(canvas, [_box(-2, level, SIZE + 2, SIZE + 2)], _tone((142, 96, 62), rng))
    boards = [_box(-2, y, SIZE + 2, y + 0.6) for y in np.arange(level + 5, SIZE, 5).tolist()]
    canvas = _fill(canvas, boards, _tone((110, 72, 46), rng))
    canvas = _fill(canvas, [_box(-2, level - 2, SIZE + 2, level)], _tone((246, 240, 230), rng))
    x = float(rng.choice([6, 46])) + float(rng.uniform(-2, 2))
    canvas = _fill(canvas, [_box(x, 6, x + 13, 21)], _tone((246, 240, 230), rng))
    panes = [_box(x + 1 + i * 6, 7 + j * 7, x + 6 + i * 6, 13 + j * 7) for i in (0, 1) for j in (0, 1)]
    return _fill(canvas, panes, _tone((140, 196, 232), rng))


GROUNDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "room": _room,
}
