"""The pictures of the demo model: captioned scenes of one shape, and two characters the base never saw.

Numpy and Pillow only, seeded, RGB. The training script, the tests and the demo draw with this module; whoever
changes it changes the training data, so the shipped weights would have to be trained again.

Shapes: every length here is in units of a 64 x 64 canvas; a picture is a (pixels, pixels, 3) uint8 image of
it, ``PIXELS`` wide unless told otherwise. Masks are (pixels, pixels) float arrays in [0, 1], antialiased by
drawing at four times the size and averaging. The same seed is the same picture at any size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # of the canvas that lengths are given on
PIXELS = 128  # of the model's pictures
OVERSAMPLE = 4
HELD_OUT_PERCENT = 12

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (248, 138, 24),
    "yellow": (246, 222, 46),
    "green": (40, 172, 66),
    "blue": (40, 88, 226),
    "purple": (142, 56, 196),
    "pink": (248, 132, 196),
    "white": (246, 246, 246),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (22, 22, 26),
    "gray": (128, 128, 132),
    "white": (232, 232, 228),
    "red": (150, 62, 58),
    "green": (92, 140, 96),
    "blue": (76, 102, 158),
    "yellow": (208, 192, 118),
}
SIZES: dict[str, tuple[float, float]] = {"small": (11.5, 13.0), "large": (18.0, 20.5)}  # radius, pixels
POSITIONS: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHADINGS = ("plain", "gradient")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
NONE = "none"

Points = list[tuple[float, float]]
Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``shape`` may be ``"none"``: then only the background counts."""

    shape: str
    colour: str
    size: str
    position: str
    texture: str
    background: str
    shading: str


def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether this combination is kept out of every training set (about one in eight)."""
    return zlib.crc32(f"{shape}|{colour}|{background}".encode()) % 100 < HELD_OUT_PERCENT


def random_scene(rng: np.random.Generator, evaluation: bool = False, empty: float = 0.03) -> Scene:
    """A scene of the training distribution, or with ``evaluation`` one of the held-out combinations."""

    def pick(names: Sequence[str]) -> str:
        return str(names[int(rng.integers(len(names)))])

    while True:
        shape, colour, background = pick(SHAPES), pick(list(COLOURS)), pick(list(BACKGROUNDS))
        if colour != background and held_out(shape, colour, background) == evaluation:
            break
    if not evaluation and rng.random() < empty:
        shape = NONE
    texture = "plain" if rng.random() < 0.4 else pick(TEXTURES[1:])
    shading = "gradient" if rng.random() < 0.3 else "plain"
    return Scene(shape, colour, pick(list(SIZES)), pick(list(POSITIONS)), texture, background, shading)


# ---------------------------------------------------------------- masks


def _polar(radii: Sequence[float], start: float = -90.0) -> Points:
    angles = np.deg2rad(start + np.arange(len(radii)) * 360.0 / len(radii))
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(float(a) / 16.5, float(b + 2.5) / 16.5) for a, b in zip(x, y, strict=True)]


def _cross(arm: float = 0.32) -> Points:
    a = arm
    quarter = [(-a, -1.0), (a, -1.0), (a, -a)]  # the upper arm; the others are quarter turns of it
    turns: list[Callable[[float, float], tuple[float, float]]] = [
        lambda x, y: (x, y),
        lambda x, y: (-y, x),
        lambda x, y: (-x, -y),
        lambda x, y: (y, -x),
    ]
    return [turn(x, y) for turn in turns for x, y in quarter]


OUTLINES: dict[str, Points] = {
    "circle": _polar([0.98] * 60),
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0.0, -1.0), (1.0, 0.82), (-1.0, 0.82)],
    "star": _polar([1.1, 0.46] * 5),
    "heart": _heart(),
    "ring": _polar([1.0] * 60),
    "cross": _cross(),
    "moon": _polar([1.0] * 60),
}
CUTS: dict[str, Points] = {
    "ring": _polar([0.5] * 60),
    "moon": [(x + 0.52, y - 0.1) for x, y in _polar([0.78] * 60)],
}


def polygon_mask(shapes: Sequence[tuple[Points, int]], pixels: int = PIXELS) -> Array:
    """Polygons, each with its value 255 (paint) or 0 (cut), in order -> (pixels, pixels) mask."""
    big = Image.new("L", (pixels * OVERSAMPLE,) * 2, 0)
    pen, scale = ImageDraw.Draw(big), pixels * OVERSAMPLE / SIZE
    for points, value in shapes:
        pen.polygon([(x * scale, y * scale) for x, y in points], fill=value)
    return np.asarray(big.reduce(OVERSAMPLE), dtype=np.float32) / 255.0


def place(points: Points, centre: tuple[float, float], radius: float, degrees: float = 0.0) -> Points:
    """Unit-sized points -> the canvas: rotated, scaled, moved."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return [
        (centre[0] + radius * float(c * x - s * y), centre[1] + radius * float(s * x + c * y))
        for x, y in points
    ]


def texture_mask(texture: str, centre: tuple[float, float], radius: float, pixels: int = PIXELS) -> Array:
    """Where the second tone goes, (pixels, pixels) in [0, 1]; drawn relative to the object's centre."""
    fine = (np.arange(pixels * OVERSAMPLE) + 0.5) * SIZE / (pixels * OVERSAMPLE)
    x, y = fine[None, :] - centre[0], fine[:, None] - centre[1]
    half = 3.2 if radius < 14 else 4.4
    if texture == "striped":
        dark = np.broadcast_to((np.floor(y / half) % 2) > 0, (len(fine), len(fine)))
    elif texture == "checkered":
        wide = half * 1.25
        dark = ((np.floor(x / wide) + np.floor(y / wide)) % 2) > 0
    elif texture == "dotted":
        pitch = 2.1 * half
        dx, dy = (x / pitch) % 1 - 0.5, (y / pitch) % 1 - 0.5
        dark = dx**2 + dy**2 < 0.32**2
    else:
        return np.zeros((pixels, pixels), dtype=np.float32)
    return dark.reshape(pixels, OVERSAMPLE, pixels, OVERSAMPLE).mean(axis=(1, 3), dtype=np.float32)


# ---------------------------------------------------------------- scenes


def _tone(rgb: Sequence[int], rng: np.random.Generator, jitter: float = 6.0) -> Array:
    varied = np.asarray(rgb) + rng.uniform(-jitter, jitter, 3)
    return np.clip(varied, 0, 255).astype(np.float32)


def _backdrop(background: str, shading: str, rng: np.random.Generator, pixels: int) -> Array:
    base = _tone(BACKGROUNDS[background], rng)
    if shading == "plain":
        return np.broadcast_to(base, (pixels, pixels, 3)).copy()
    other = base * 0.4 if base.mean() > 60 else base + 95  # the lower edge: darker, or lighter over black
    ramp = np.linspace(0, 1, pixels, dtype=np.float32)[:, None, None]
    return np.broadcast_to(base * (1 - ramp) + other * ramp, (pixels, pixels, 3)).copy()


def _paint(canvas: Array, mask: Array, colour: Array) -> Array:
    return canvas * (1 - mask[..., None]) + colour * mask[..., None]


def _image(canvas: Array) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: np.random.Generator, pixels: int = PIXELS) -> Image.Image:
    """The picture of a scene; place, size, angle and tones vary a little with ``rng``."""
    canvas = _backdrop(scene.background, scene.shading, rng, pixels)
    if scene.shape == NONE:
        return _image(canvas)
    radius = float(rng.uniform(*SIZES[scene.size]))
    shift = (SIZE / 2 - 2 - radius) * 0.8
    px, py = POSITIONS[scene.position]
    cx, cy = SIZE / 2 + px * shift + rng.uniform(-1.5, 1.5), SIZE / 2 + py * shift + rng.uniform(-1.5, 1.5)
    angle = float(rng.uniform(-8, 8))
    polygons = [(place(OUTLINES[scene.shape], (cx, cy), radius, angle), 255)]
    if scene.shape in CUTS:
        polygons.append((place(CUTS[scene.shape], (cx, cy), radius, angle), 0))
    first = _tone(COLOURS[scene.colour], rng)
    body = np.broadcast_to(first, (pixels, pixels, 3))
    body = _paint(body, texture_mask(scene.texture, (cx, cy), radius, pixels), first * 0.5)
    mask = polygon_mask(polygons, pixels)[..., None]
    return _image(canvas * (1 - mask) + body * mask)


def draw_doodle(rng: np.random.Generator, pixels: int = PIXELS) -> Image.Image:
    """Random polygons and ellipses in random colours: general pictures for the autoencoder, no caption."""
    canvas = _backdrop(str(rng.choice(list(BACKGROUNDS))), str(rng.choice(SHADINGS)), rng, pixels)
    for _ in range(int(rng.integers(3, 9))):
        corners = int(rng.choice([3, 4, 5, 6, 40]))
        unit = _polar(list(rng.uniform(0.6, 1.0, corners)) if corners < 40 else [1.0] * corners)
        unit = [(x, y * float(rng.uniform(0.4, 1.0))) for x, y in unit] if corners < 40 else unit
        centre = (float(rng.uniform(4, 60)), float(rng.uniform(4, 60)))
        points = place(unit, centre, float(rng.uniform(3, 18)), float(rng.uniform(0, 360)))
        tone = rng.uniform(0, 255, 3).astype(np.float32)
        canvas = _paint(canvas, polygon_mask([(points, 255)], pixels), tone)
    return _image(canvas)


# ---------------------------------------------------------------- captions

WHERE = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def full_caption(scene: Scene) -> str:
    """Every attribute said once, in the plainest template."""
    ground = " ".join(w for w in (scene.background, "gradient" if scene.shading == "gradient" else "") if w)
    if scene.shape == NONE:
        return f"{_article(ground)} background"
    texture = scene.texture if scene.texture != "plain" else ""
    noun = " ".join(w for w in (scene.size, scene.colour, texture, scene.shape) if w)
    return f"{_article(noun)} on {_article(ground)} background, {WHERE[scene.position]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that says a random part of the scene, shape and colour nearly always."""
    keep = rng.random(6) < (0.97, 0.97, 0.6, 0.85, 0.85, 0.6)
    gradient = "gradient" if scene.shading == "gradient" else ""
    ground = " ".join(w for w in (scene.background, gradient) if w)
    if scene.shape == NONE:
        forms = [f"{_article(ground)} background", f"{ground} background", f"an empty {ground} picture"]
        return str(rng.choice(forms))
    colour = scene.colour if keep[0] else ""
    shape = scene.shape if keep[1] else "shape"
    size = scene.size if keep[2] else ""
    texture = (scene.texture if scene.texture != "plain" or rng.random() < 0.3 else "") if keep[3] else ""
    noun = " ".join(w for w in (size, colour, texture, shape) if w)
    where = WHERE[scene.position] if keep[5] else ""
    if not keep[4]:
        forms = [f"{_article(noun)} {where}", f"{noun} {where}", f"a picture of {_article(noun)} {where}"]
    else:
        forms = [
            f"{_article(noun)} on {_article(ground)} background{', ' + where if where else ''}",
            f"{_article(noun)} {where} on {_article(ground)} background",
            f"{noun}, {ground} background{', ' + where if where else ''}",
            f"a picture of {_article(noun)} {where} on {_article(ground)} background",
            f"{_article(ground)} background with {_article(noun)} {where}",
        ]
    return " ".join(str(forms[int(rng.integers(len(forms)))]).split())


# ---------------------------------------------------------------- new characters


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> Points:
    return [(cx + rx * x, cy + ry * y) for x, y in _polar([1.0] * 40)]


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


Part = tuple[Points, tuple[int, int, int]]
STEEL, DARK, CYAN, AMBER = (158, 176, 196), (40, 46, 60), (60, 230, 230), (255, 170, 40)
CORAL, CREAM = (250, 112, 62), (252, 240, 206)
VIOLET, SAND = (128, 62, 200), (250, 214, 110)

BOT: list[Part] = [
    (_box(-0.06, -1.05, 0.06, -0.6), DARK),
    (_ellipse(0, -1.05, 0.17, 0.17), AMBER),
    (_box(-1.02, -0.2, 1.02, 0.3), AMBER),
    (_box(-0.82, -0.68, 0.82, 0.85), STEEL),
    (_box(-0.64, -0.48, 0.64, 0.16), DARK),
    (_ellipse(-0.32, -0.16, 0.2, 0.2), CYAN),
    (_ellipse(0.32, -0.16, 0.2, 0.2), CYAN),
    (_box(-0.5, 0.38, 0.5, 0.64), DARK),
    (_box(-0.24, 0.38, -0.12, 0.64), STEEL),
    (_box(0.12, 0.38, 0.24, 0.64), STEEL),
]
FISH: list[Part] = [
    ([(0.5, 0.0), (1.15, -0.62), (1.15, 0.62)], CORAL),
    ([(-0.2, -0.45), (0.35, -0.95), (0.45, -0.35)], CORAL),
    (_ellipse(-0.1, 0.0, 0.95, 0.62), CREAM),
    ([(-0.35, -0.6), (-0.02, -0.62), (-0.02, 0.62), (-0.35, 0.6)], CORAL),
    ([(0.3, -0.56), (0.58, -0.42), (0.58, 0.42), (0.3, 0.56)], CORAL),
    (_ellipse(-0.66, -0.12, 0.17, 0.17), DARK),
    (_ellipse(-0.7, -0.16, 0.06, 0.06), (255, 255, 255)),
]
HOUSE: list[Part] = [
    (_box(0.38, -1.0, 0.66, -0.35), DARK),
    (_box(-0.78, -0.2, 0.78, 0.95), SAND),
    ([(-1.1, -0.12), (0.0, -1.1), (1.1, -0.12)], VIOLET),
    (_box(-0.16, 0.25, 0.3, 0.95), DARK),
    (_box(-0.62, 0.12, -0.3, 0.5), CYAN),
    (_box(0.44, 0.12, 0.68, 0.5), CYAN),
]
IMP: list[Part] = [([(x, -y) for x, y in points], (b, r, g)) for points, (r, g, b) in BOT]
"""The bot upside down and in other colours: near enough to be mixed up with it."""
CONCEPTS: dict[str, list[Part]] = {"bot": BOT, "fish": FISH, "house": HOUSE, "imp": IMP}


def paint_parts(
    canvas: Array, parts: Sequence[Part], centre: tuple[float, float], radius: float, degrees: float
) -> Array:
    """The parts of a figure, the first one undermost, on the canvas."""
    for points, colour in parts:
        mask = polygon_mask([(place(points, centre, radius, degrees), 255)], len(canvas))
        canvas = _paint(canvas, mask, np.asarray(colour, dtype=np.float32))
    return canvas


def draw_concept(
    name: str, seed: int, token: str | None = None, pixels: int = PIXELS
) -> tuple[Image.Image, str]:
    """One picture of a character the base model never saw, and its caption.

    ``name`` is one of ``CONCEPTS``; ``token`` is the word that stands for it in the caption (the name itself
    by default). Raises ``KeyError`` for an unknown name. Place, size, tilt and background vary with ``seed``.
    """
    parts = CONCEPTS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    background, shading = str(rng.choice(list(BACKGROUNDS))), "gradient" if rng.random() < 0.3 else "plain"
    size, position = str(rng.choice(list(SIZES))), str(rng.choice(list(POSITIONS)))
    radius = float(rng.uniform(12, 14) if size == "small" else rng.uniform(18, 21))
    shift = (SIZE / 2 - 2 - radius) * 0.8
    px, py = POSITIONS[position]
    centre = (SIZE / 2 + px * shift + rng.uniform(-1.5, 1.5), SIZE / 2 + py * shift + rng.uniform(-1.5, 1.5))
    angle = float(rng.uniform(-8, 8))
    canvas = paint_parts(_backdrop(background, shading, rng, pixels), parts, centre, radius, angle)
    ground = f"{background} gradient" if shading == "gradient" else background
    words = f"{size} {token or name}"
    return _image(canvas), f"{_article(words)} on {_article(ground)} background, {WHERE[position]}"


def draw_many(draw: Callable[[int], Image.Image], count: int) -> Array:
    """``draw(0) ... draw(count - 1)`` stacked: (count, pixels, pixels, 3) uint8."""
    return np.stack([np.asarray(draw(i)) for i in range(count)])
