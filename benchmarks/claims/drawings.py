"""What the experiments draw: two styles of the embedded model's scenes, and four characters.

Styles combine: ``("inked", "poster")`` is a picture in both. A style's training pictures say the style's
word and a part of the scene; concepts are the characters of ``demo_model/draw.py`` and ``imp``, the bot
recoloured and upside down. Everything is a function of the seed. Shapes: pictures are RGB, ``draw.PIXELS``
wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from demo_model import draw

CHARACTERS = tuple(draw.CONCEPTS)
BACKGROUNDS = ("green", "blue", "gray", "red")  # that prompts for characters ask for
UNIT = draw.PIXELS // draw.SIZE  # pixels of a unit of the canvas
BANDS, SHADOW, FRAME, LINE = 20 * UNIT, 6 * UNIT, 6 * UNIT, 3 * UNIT  # finer ones the autoencoder loses
INK, CREAM = np.array([18.0, 14.0, 24.0]), np.array([250.0, 238.0, 205.0])
Drawn = tuple[Image.Image, str]


def _object_mask(scene: draw.Scene, seed: int) -> np.ndarray:
    """(H, W) booleans: where the picture of this seed differs from its own background."""
    full = np.asarray(draw.draw_scene(scene, np.random.default_rng(seed)), dtype=np.int16)
    empty = draw.draw_scene(replace(scene, shape=draw.NONE), np.random.default_rng(seed))
    return np.abs(full - np.asarray(empty, dtype=np.int16)).sum(2) > 24


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = (
            padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        )
    return mask


def _inked(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A thick dark outline around the object, the background in broad diagonal bands."""
    y, x = np.mgrid[: draw.PIXELS, : draw.PIXELS]
    band = ((x + y) % BANDS < BANDS / 2) & ~mask
    out = np.where(band[..., None], pixels * 0.55, pixels)
    return np.where((_grown(mask, LINE) & ~mask)[..., None], INK, out)


def _poster(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A cream frame, and a hard shadow of the object to the lower right."""
    shadow = np.zeros_like(mask)
    shadow[SHADOW:, SHADOW:] = mask[:-SHADOW, :-SHADOW]
    out = np.where((shadow & ~mask)[..., None], pixels * 0.3, pixels)
    y, x = np.mgrid[: draw.PIXELS, : draw.PIXELS]
    inside = (np.minimum(x, y) >= FRAME) & (np.maximum(x, y) < draw.PIXELS - FRAME)
    return np.where(inside[..., None], out, CREAM)


STYLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "inked": _inked,
    "poster": _poster,
}


def styled(scene: draw.Scene, seed: int, styles: Sequence[str]) -> Image.Image:
    """The scene's picture of this seed, in the given styles (none: as the base model knows it)."""
    pixels = np.asarray(draw.draw_scene(scene, np.random.default_rng(seed)), dtype=np.float32)
    mask = _object_mask(scene, seed)
    for name, paint in STYLES.items():  # one order, whatever the caller's
        if name in styles:
            pixels = paint(pixels, mask)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def style_picture(style: str, seed: int) -> Drawn:
    """One training picture of a style with its caption: the style's word, then a part of the scene."""
    rng = np.random.default_rng([seed, len(style)])
    scene = draw.random_scene(rng, empty=0.0)
    return styled(scene, seed, (style,)), f"{style} {draw.caption(scene, rng)}"
