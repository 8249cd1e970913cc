"""The model's pictures: ``draw``'s scenes, and with them grounds, creatures and pairs.

A picture shows one object as a ``draw.Scene`` does, or two: the first one named stands left of the second
("beside") or above it. An object may be a creature instead of a shape, a background a ground ("in a meadow").

Shapes: a picture is a (128, 128, 3) uint8 image, a wide one (128, 192, 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from . import draw
from .draw import CUTS, NONE, OUTLINES, PIXELS, Array
from .figures import creature
from .grounds import ALIKE, GROUNDS, PHRASES

CREATURE = "creature"
OBJECTS = (*draw.SHAPES, CREATURE)
PLACES = (*draw.BACKGROUNDS, *GROUNDS)
PAIRED = {"beside": (1, 0), "above": (0, 1)}  # how two objects stand: the second one seen from the first
POSITIONS = (*draw.POSITIONS, *PAIRED)
PAIR_RADIUS, PAIR_SHIFT = (11.5, 14.0), 15.5
WIDE = (PIXELS * 3 // 2, PIXELS)  # width and height: two objects, each as large as one alone


@dataclass(frozen=True)
class Picture(draw.Scene):
    """A scene, and of a pair also the second object; then ``position`` is one of ``PAIRED``, and ``size`` is
    large in a wide picture alone. A creature's texture is always plain."""

    second: str = NONE
    second_colour: str = NONE
    second_texture: str = NONE

    @property
    def pair(self) -> bool:
        return self.second != NONE


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return str(names[int(rng.integers(len(names)))])


def _texture(shape: str, rng: np.random.Generator) -> str:
    plain = rng.random() < 0.4 or shape == CREATURE
    return "plain" if plain else _pick(rng, draw.TEXTURES[1:])


def random_picture(
    rng: np.random.Generator,
    evaluation: bool = False,
    pair: bool | None = None,
    empty: float = 0.03,
    creatures: float = 0.18,
) -> Picture:
    """A picture of the training distribution, or with ``evaluation`` of held-out combinations only.

    ``pair`` asks for two objects (True), one (False) or either; ``creatures`` is their share of the objects.
    """
    pair = bool(rng.random() < 0.3) if pair is None else pair
    while True:
        background = _pick(rng, list(GROUNDS if rng.random() < 0.3 else draw.BACKGROUNDS))
        shapes = [CREATURE if rng.random() < creatures else _pick(rng, draw.SHAPES) for _ in range(1 + pair)]
        colours = [_pick(rng, list(draw.COLOURS)) for _ in shapes]
        seen = [draw.held_out(s, c, background) for s, c in zip(shapes, colours, strict=True)]
        hidden = any(c == background or (c, background) in ALIKE for c in colours)
        twice = pair and shapes[0] == shapes[1] and colours[0] == colours[1]
        if not hidden and not twice and all(s == evaluation for s in seen):
            break
    textures = [_texture(s, rng) for s in shapes]
    shaded = background in draw.BACKGROUNDS and rng.random() < 0.3
    shading = "gradient" if shaded else "plain"
    if pair:
        return Picture(
            shapes[0], colours[0], "small", _pick(rng, list(PAIRED)), textures[0], background, shading,
            shapes[1], colours[1], textures[1],
        )  # fmt: skip
    if not evaluation and rng.random() < empty:
        shapes, textures = [NONE], ["plain"]
    size, position = _pick(rng, list(draw.SIZES)), _pick(rng, list(draw.POSITIONS))
    return Picture(shapes[0], colours[0], size, position, textures[0], background, shading)


def random_wide_picture(
    rng: np.random.Generator, evaluation: bool = False, creatures: float = 0.18
) -> Picture:
    """Two large objects beside each other, for a wide picture."""
    pair = random_picture(rng, evaluation, pair=True, creatures=creatures)
    return replace(pair, size="large", position="beside")


def draw_wide(picture: Picture, rng: np.random.Generator) -> Image.Image:
    """The middle of the same pair on a canvas half as large again."""
    width, height = WIDE
    top = (width - height) // 2
    return draw_picture(picture, rng, width).crop((0, top, width, top + height))


def _paint_object(
    canvas: Array, shape: str, colour: str, texture: str, centre: tuple[float, float], radius: float,
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """A shape, a creature, or one of ``draw.CONCEPTS``, which has colours of its own."""
    angle = float(rng.uniform(-8, 8))
    parts = creature(colour, rng) if shape == CREATURE else draw.CONCEPTS.get(shape)
    if parts is not None:
        return draw.paint_parts(canvas, parts, centre, radius, angle)
    polygons = [(draw.place(OUTLINES[shape], centre, radius, angle), 255)]
    if shape in CUTS:
        polygons.append((draw.place(CUTS[shape], centre, radius, angle), 0))
    tone, pixels = draw._tone(draw.COLOURS[colour], rng), len(canvas)
    body = np.broadcast_to(tone, canvas.shape)
    body = draw._paint(body, draw.texture_mask(texture, centre, radius, pixels), tone * 0.5)
    mask = draw.polygon_mask(polygons, pixels)[..., None]
    return canvas * (1 - mask) + body * mask


def draw_picture(picture: Picture, rng: np.random.Generator, pixels: int = PIXELS) -> Image.Image:
    """The picture; places, sizes, angles and tones vary a little with ``rng``."""
    if picture.background in GROUNDS:
        canvas = GROUNDS[picture.background](rng, pixels)
    else:
        canvas = draw._backdrop(picture.background, picture.shading, rng, pixels)
    middle = draw.SIZE / 2
    if picture.shape == NONE:
        return draw._image(canvas)
    if not picture.pair:
        radius = float(rng.uniform(*draw.SIZES[picture.size]))
        shift = (middle - 2 - radius) * 0.8
        px, py = draw.POSITIONS[picture.position]
        centre = _near(middle + px * shift, rng), _near(middle + py * shift, rng)
        colour, texture = picture.colour, picture.texture
        return draw._image(_paint_object(canvas, picture.shape, colour, texture, centre, radius, rng))
    dx, dy = PAIRED[picture.position]
    pair = (
        (-1, picture.shape, picture.colour, picture.texture),
        (1, picture.second, picture.second_colour, picture.second_texture),
    )
    for side, shape, colour, texture in pair:
        canvas = _paint_half(canvas, (side * dx, side * dy), shape, colour, texture, rng)
    return draw._image(canvas)


def _paint_half(
    canvas: Array, side: tuple[int, int], shape: str, colour: str, texture: str, rng: np.random.Generator
) -> Array:
    """One object of a pair; ``side``: which way it stands from the middle, right and down."""
    x, y = (_near(draw.SIZE / 2 + PAIR_SHIFT * way, rng) for way in side)
    radius = float(rng.uniform(*PAIR_RADIUS))
    return _paint_object(canvas, shape, colour, texture, (x, y), radius, rng)


def _near(place: float, rng: np.random.Generator) -> float:
    return place + float(rng.uniform(-1.5, 1.5))


def draw_beside(
    name: str, seed: int, token: str | None = None, pixels: int = PIXELS, side: str = ""
) -> tuple[Image.Image, str]:
    """One of ``draw.CONCEPTS`` beside a plain shape, and its caption: what keeps a new word from meaning the
    whole picture. ``token`` stands for the character, its name by default. With a ``side``, "left" or
    "right", it stands there in a wide picture, as large as alone, of which this is the square at that end;
    else the seed chooses."""
    rng = np.random.default_rng([seed, 2, zlib.crc32(name.encode())])
    shape, colour = _pick(rng, draw.SHAPES), _pick(rng, list(draw.COLOURS))
    background = _pick(rng, [b for b in draw.BACKGROUNDS if b != colour])
    whole, size = (pixels * 3 // 2, "large") if side else (pixels, "")
    canvas = draw._backdrop(background, "plain", rng, whole)
    things = [(name, _noun(size, token or name)), (shape, _noun(size, colour, shape))]
    if side == "right" or (not side and rng.random() >= 0.5):
        things.reverse()
    for way, (thing, _) in zip((-1, 1), things, strict=True):
        canvas = _paint_half(canvas, (way, 0), thing, colour, "plain", rng)
    said = " and ".join(words for _, words in things)
    left, top = whole - pixels if side == "right" else 0, (whole - pixels) // 2
    picture = draw._image(canvas).crop((left, top, left + pixels, top + pixels))
    return picture, f"{said} on {draw._article(background)} background"


# ---------------------------------------------------------------- captions


def _noun(*words: str) -> str:
    return draw._article(" ".join(w for w in words if w and w != "plain"))


def _things(picture: Picture, rng: np.random.Generator | None = None) -> str:
    """The two objects of a pair in words; with ``rng`` some of the textures and ways to say it."""
    say = [rng is None or rng.random() < 0.85 for _ in range(2)]
    size = picture.size if picture.size == "large" and (rng is None or rng.random() < 0.6) else ""
    first = _noun(size, picture.colour, picture.texture if say[0] else "", picture.shape)
    second = _noun(size, picture.second_colour, picture.second_texture if say[1] else "", picture.second)
    if picture.position == "above":
        return f"{first} above {second}"
    return f"{first} and {second}" if rng is None or rng.random() < 0.7 else f"{first} next to {second}"


def _ground(picture: Picture) -> str:
    if picture.background in GROUNDS:
        return PHRASES[picture.background]
    shaded = " gradient" if picture.shading == "gradient" else ""
    return f"on {draw._article(picture.background)}{shaded} background"


def full_caption(picture: Picture) -> str:
    """Every attribute said once, in the plainest template."""
    if picture.pair:
        return f"{_things(picture)} {_ground(picture)}"
    if picture.background not in GROUNDS:
        return draw.full_caption(picture)
    if picture.shape == NONE:
        return f"an empty picture {_ground(picture)}"
    noun = _noun(picture.size, picture.colour, picture.texture, picture.shape)
    return f"{noun} {_ground(picture)}, {draw.WHERE[picture.position]}"


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """A caption that says a random part of the picture, shapes and colours nearly always."""
    ground = _ground(picture) if rng.random() < 0.88 else ""
    if picture.pair:
        things = _things(picture, rng)
        forms = [f"{things} {ground}", f"a picture of {things} {ground}"]
        return _pick(rng, forms).strip()
    if picture.background not in GROUNDS:
        return draw.caption(picture, rng)
    if picture.shape == NONE:
        return f"an empty picture {_ground(picture)}"
    keep = rng.random(4) < (0.97, 0.6, 0.85, 0.6)
    noun = _noun(
        picture.size if keep[1] else "",
        picture.colour if keep[0] else "",
        picture.texture if keep[2] else "",
        picture.shape,
    )
    where = draw.WHERE[picture.position] if keep[3] else ""
    forms = [
        f"{noun} {ground}{', ' + where if where else ''}",
        f"a picture of {noun} {where} {ground}",
        f"{noun} {where} {ground}",
    ]
    return " ".join(_pick(rng, forms).split())
