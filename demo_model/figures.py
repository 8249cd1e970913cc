"""Random creatures: what the model learns of faces, limbs and patterns before it meets a new character.

A creature is a list of coloured polygons as ``draw.BOT`` is one, put together anew from every seed: seen from
the front (and then the same on both sides) or from the side. None is one of the demo's characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from . import draw
from .draw import Part, Points, _box, _ellipse
from .grounds import GROUNDS

INK = ((26, 28, 36), (44, 38, 60), (70, 40, 30))
LIGHT = ((255, 255, 255), (246, 240, 214), (214, 240, 250))
Colour = tuple[int, int, int]


def _tone(rgb: Sequence[int], rng: np.random.Generator, jitter: float = 18.0) -> Colour:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-jitter, jitter, 3), 0, 255).astype(int).tolist()
    return r, g, b


def _any(rng: np.random.Generator, tones: Sequence[Colour]) -> Colour:
    return tones[int(rng.integers(len(tones)))]


def _second(rng: np.random.Generator) -> Colour:
    """A colour for a part that is not the body: mostly any at all."""
    draw_from = rng.random()
    if draw_from < 0.2:
        return _any(rng, INK)
    if draw_from < 0.4:
        return _any(rng, LIGHT)
    r, g, b = rng.integers(20, 250, 3).tolist()
    return r, g, b


def _blob(kind: int, cx: float, cy: float, rx: float, ry: float) -> Points:
    if kind == 0:
        return _ellipse(cx, cy, rx, ry)
    if kind == 1:
        return _box(cx - rx, cy - ry, cx + rx, cy + ry)
    if kind == 2:  # narrower above
        return [(cx - 0.6 * rx, cy - ry), (cx + 0.6 * rx, cy - ry), (cx + rx, cy + ry), (cx - rx, cy + ry)]
    if kind == 3:  # a box without corners
        a, b = 0.55 * rx, 0.55 * ry
        corners = [(a, -ry), (rx, -b), (rx, b), (a, ry), (-a, ry), (-rx, b), (-rx, -b), (-a, -ry)]
        return [(cx + x, cy + y) for x, y in corners]
    return [(cx, cy - ry), (cx + rx, cy + ry), (cx - rx, cy + ry)]


def _both(points: Points, colour: Colour) -> list[Part]:
    """A part and its mirror image."""
    return [(points, colour), ([(-x, y) for x, y in points], colour)]


def _eye(cx: float, cy: float, r: float, rng: np.random.Generator) -> list[Part]:
    white, pupil = _any(rng, LIGHT) if rng.random() < 0.6 else _second(rng), _any(rng, INK)
    kind = int(rng.choice([0, 0, 0, 1]))
    parts = [(_blob(kind, cx, cy, r, r), white)]
    if rng.random() < 0.75:
        parts.append((_blob(kind, cx + rng.uniform(-0.3, 0.3) * r, cy, 0.5 * r, 0.5 * r), pupil))
    else:
        parts[0] = (parts[0][0], pupil)
    return parts


def _mouth(cy: float, half: float, rng: np.random.Generator) -> list[Part]:
    tone, high = _any(rng, INK) if rng.random() < 0.6 else _second(rng), float(rng.uniform(0.05, 0.16))
    kind = int(rng.integers(4))
    if kind == 0:  # a bar, sometimes with teeth
        parts = [(_box(-half, cy - high, half, cy + high), tone)]
        if rng.random() < 0.6:
            parts += [
                (_box(x - 0.06, cy - high, x + 0.06, cy + high), (240, 240, 236))
                for x in (-0.5 * half, 0.5 * half)
            ]
        return parts
    if kind == 1:  # open
        return [(_ellipse(0, cy, 0.6 * half, 1.3 * high), tone)]
    t = np.linspace(0, np.pi, 12)
    bend = 1 if kind == 2 else -1  # a smile or the other thing
    outer = [(float(half * np.cos(a)), cy + bend * float(1.8 * high * np.sin(a))) for a in t]
    inner = [(0.8 * x, cy + 0.35 * (y - cy)) for x, y in reversed(outer)]
    return [([*outer, *inner], tone)]


def _from_the_front(body: Colour, rng: np.random.Generator) -> list[Part]:
    second, third = _second(rng), _second(rng)
    kind, rx, ry = int(rng.integers(5)), float(rng.uniform(0.6, 0.95)), float(rng.uniform(0.6, 0.88))
    parts: list[Part] = []
    top = int(rng.integers(4))
    if top == 0:
        parts += [(_box(-0.06, -1.1, 0.06, -0.5), second), (_ellipse(0, -1.05, 0.16, 0.16), third)]
    elif top in (1, 2):  # ears or horns
        x, wide = float(rng.uniform(0.3, 0.7)) * rx, float(rng.uniform(0.12, 0.3))
        ear = (
            _ellipse(x, -ry, wide, 0.32)
            if top == 1
            else [(x - wide, -0.6 * ry), (x + wide, -0.6 * ry), (x + 0.1, -1.15)]
        )
        parts += _both(ear, second if rng.random() < 0.5 else body)
    limbs = int(rng.integers(3))
    if limbs < 2:
        y = float(rng.uniform(-0.2, 0.3))
        arm = _box(0.4, y - 0.13, 1.1, y + 0.13) if limbs else _ellipse(rx, y, 0.28, 0.2)
        parts += _both(arm, second)
    if rng.random() < 0.5:
        parts += _both(_box(0.16, 0.5, 0.44, 1.1), third)
    parts.append((_blob(kind, 0, 0, rx, ry), body))
    face = float(rng.uniform(-0.3, 0.0))
    if rng.random() < 0.45:  # a plate behind the face
        parts.append((_blob(int(rng.choice([0, 1, 3])), 0, face + 0.1, 0.72 * rx, 0.42), second))
    if rng.random() < 0.4:  # the belly
        parts.append((_blob(int(rng.choice([0, 1, 3])), 0, 0.62 * ry, 0.5 * rx, 0.25), third))
    r, apart = float(rng.uniform(0.12, 0.24)), float(rng.uniform(0.24, 0.38))
    if rng.random() < 0.15:
        parts += _eye(0, face, 1.4 * r, rng)
    else:
        eye = _eye(apart, face, r, rng)
        parts += [part for points, tone in eye for part in _both(points, tone)]
    if rng.random() < 0.85:
        parts += _mouth(face + float(rng.uniform(0.38, 0.55)), float(rng.uniform(0.2, 0.45)), rng)
    return parts


def _from_the_side(body: Colour, rng: np.random.Generator) -> list[Part]:
    second, third = _second(rng), _second(rng)
    kind, rx, ry = (
        int(rng.choice([0, 0, 3, 1])),
        float(rng.uniform(0.75, 0.95)),
        float(rng.uniform(0.45, 0.7)),
    )
    parts: list[Part] = []
    if rng.random() < 0.7:  # a tail
        y = float(rng.uniform(-0.4, 0.1))
        parts.append(([(0.5, 0.0), (1.15, y - 0.4), (1.15, y + float(rng.uniform(0.1, 0.8)))], second))
    if rng.random() < 0.5:
        parts.append(([(-0.3, -0.4), (float(rng.uniform(0.0, 0.4)), -1.05), (0.45, -0.35)], third))
    ground = int(rng.integers(3))
    if ground == 0:
        parts += [(_box(x - 0.13, 0.3, x + 0.13, 0.95), second) for x in (-0.4, 0.4)]
    parts.append((_blob(kind, -0.1, 0.05, rx, ry), body))
    for x in rng.uniform(-0.25, 0.6, int(rng.integers(0, 3))).tolist():  # stripes
        high = 0.85 * ry
        parts.append((_box(x - 0.12, 0.05 - high * 0.9, x + 0.12, 0.05 + high * 0.9), second))
    if rng.random() < 0.4:  # a window or a wing
        parts.append((_blob(int(rng.choice([0, 1, 4])), 0.15, 0.1, 0.3, 0.22), third))
    if ground == 1:  # wheels
        parts += [(_ellipse(x, 0.7, 0.26, 0.26), _any(rng, INK)) for x in (-0.5, 0.4)]
        parts += [(_ellipse(x, 0.7, 0.11, 0.11), second) for x in (-0.5, 0.4)]
    parts += _eye(
        float(rng.uniform(-0.7, -0.45)), float(rng.uniform(-0.2, 0.0)), float(rng.uniform(0.12, 0.22)), rng
    )
    if rng.random() < 0.5:  # a beak
        parts.append(([(-0.85, -0.05), (-1.2, 0.12), (-0.8, 0.25)], third))
    return parts


def creature(colour: str, rng: np.random.Generator) -> list[Part]:
    """A creature whose body has this colour of ``draw.COLOURS``."""
    body = _tone(draw.COLOURS[colour], rng, 8.0)
    return (_from_the_front if rng.random() < 0.65 else _from_the_side)(body, rng)


def draw_figure(rng: np.random.Generator, pixels: int) -> Image.Image:
    """One or two creatures anywhere on any background, without a caption."""
    names = list(GROUNDS) if rng.random() < 0.3 else list(draw.BACKGROUNDS)
    background, shading = str(rng.choice(names)), str(rng.choice(draw.SHADINGS))
    if background in GROUNDS:
        canvas = GROUNDS[background](rng, pixels)
    else:
        canvas = draw._backdrop(background, shading, rng, pixels)
    for _ in range(int(rng.integers(1, 3))):
        centre = (float(rng.uniform(14, 50)), float(rng.uniform(14, 50)))
        radius, angle = float(rng.uniform(11, 22)), float(rng.uniform(-12, 12))
        parts = creature(str(rng.choice(list(draw.COLOURS))), rng)
        canvas = draw.paint_parts(canvas, parts, centre, radius, angle)
    return draw._image(canvas)
