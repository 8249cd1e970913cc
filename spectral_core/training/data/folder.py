"""Pictures with captions from a folder, in the layout that kohya's trainer and ComfyUI's dataset nodes read.

``name.jpg`` + ``name.txt`` (or ``.caption``) in the folder itself or in subfolders called
``<repeats>_<name>``. ``<TOK>`` in a caption stands for the concept's token; a caption that has neither gets
the token in front. ``name.mask.png`` beside a picture is its mask: white is learned, black is not.

Shapes: a picture becomes (3, height, width) in [−1, 1], centre-cropped and resized with Lanczos; its mask (1,
height, width) in [0, 1], cropped in the same way.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import SpectralAdapterError
from ...files.reading import read_text, refuse_special
from .order import Order

__all__ = [
    "Example",
    "Order",
    "caption_for",
    "find_examples",
    "insert_token",
    "load_mask",
    "load_picture",
    "load_pictures",
]

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_ENDINGS = (".txt", ".caption")
MASK_ENDING = ".mask.png"
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".psd", ".svg")  # not read
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # told by the content: no other decoder sees a file
PLACEHOLDER = "<TOK>"
MOST_CAPTION = 1 << 20  # bytes
MOST_REPEATS = 10_000
MOST_PIXELS = 50_000_000  # 200 MB while a picture is open
# What decoders raise over a damaged file: they share no type.
_OF_DECODERS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
)
_OF_DECODERS += (SyntaxError, EOFError, MemoryError, AssertionError, struct.error, zlib.error)
_OF_DECODERS += (Image.DecompressionBombError,)
_REPEATS = re.compile(r"([0-9]{1,18})_.+", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One picture file with its caption and how often an epoch shows it; ``captioned``: it had a caption of
    its own; ``mask``: its mask file."""

    path: Path
    caption: str
    repeats: int = 1
    captioned: bool = True
    mask: Path | None = None


def find_examples(folder: str | Path, token: str = "") -> list[Example]:
    """Every picture of a folder with its caption, in the order of names. Raises when there is none.

    token: is put into the captions; without one they stay as they are written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpectralAdapterError(
            f"picture folder {folder}: not a folder; expected one with pictures and captions"
        )
    examples = [
        Example(path, caption_for(path, token), repeats, _caption_file(path) is not None, _mask_of(path))
        for sub, repeats in _picture_folders(folder)
        for path in _files(sub)
        if path.suffix.lower() in PICTURE_ENDINGS
        and not path.name.startswith(".")
        and not path.name.endswith(MASK_ENDING)
    ]
    if not examples:
        raise SpectralAdapterError(
            f"picture folder {folder}: no pictures found; expected files ending in "
            f"{', '.join(PICTURE_ENDINGS)} there or in subfolders named like 10_mydog"
        )
    return examples


def _picture_folders(folder: Path) -> list[tuple[Path, int]]:
    """The folder itself once, then its ``<repeats>_<name>`` subfolders."""
    found = [(folder, 1)]
    for sub in (entry for entry in _listed(folder) if entry.is_dir()):
        if match := _REPEATS.fullmatch(sub.name):
            if int(match[1]) > MOST_REPEATS:
                raise SpectralAdapterError(
                    f"picture folder {sub}: its name asks for {match[1]} repeats, at most {MOST_REPEATS} are "
                    "shown; rename the folder"
                )
            found.append((sub, max(1, int(match[1]))))
    return found


def _files(folder: Path) -> list[Path]:
    """The ordinary files of a folder by name: a named pipe that is called like a picture is none."""
    return [path for path in _listed(folder) if path.is_file()]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SpectralAdapterError(
            f"picture folder {folder}: cannot be listed ({error.strerror or error})"
        ) from error


def _mask_of(picture: Path) -> Path | None:
    mask = picture.with_name(picture.stem + MASK_ENDING)
    return mask if mask.is_file() else None


def _caption_file(picture: Path) -> Path | None:
    return next((p for e in CAPTION_ENDINGS if (p := picture.with_suffix(e)).is_file()), None)


def caption_for(picture: Path, token: str) -> str:
    """The caption beside a picture with the token in it; without a caption file, ``a picture of <token>``."""
    path = _caption_file(picture)
    if path is not None:
        return insert_token(_read_text(path), token)
    return f"a picture of {token}" if token else ""


def insert_token(caption: str, token: str) -> str:
    """The caption with ``<TOK>`` replaced; the token goes in front where it does not occur."""
    caption = " ".join(caption.replace(PLACEHOLDER, token).split())
    if not token or token in caption:
        return caption
    return f"{token}, {caption}" if caption else token


def _read_text(path: Path) -> str:
    try:
        return read_text(path, MOST_CAPTION)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"caption file {error}") from error


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """(3, height, width) in [−1, 1]: rotated as its EXIF says, transparency on white, cropped about its
    centre."""
    fitted = ImageOps.fit(_flatten(_open(path)), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def load_mask(path: Path, width: int, height: int) -> Tensor:
    """(1, height, width) in [0, 1], cropped as its picture is."""
    fitted = ImageOps.fit(_open(path).convert("L"), (width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)[None]


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) as it is shown. Decodes the whole file, so a broken one is found."""
    return _open(path).size


def _open(path: Path) -> Image.Image:
    """The picture, turned as its EXIF says. Its size is looked at before it is decoded."""
    refuse_special(path)
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise SpectralAdapterError(
                    f"picture {path}: {width} × {height} pixels, at most {MOST_PIXELS / 1e6:.0f} million are "
                    "read; make it smaller"
                )
            opened.load()
            return _eight_bits(ImageOps.exif_transpose(opened))
    except _OF_DECODERS as error:
        raise SpectralAdapterError(
            f"picture {path}: cannot be read as a picture ({str(error) or type(error).__name__}); remove or "
            "replace it"
        ) from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel, which Pillow would cut off at 255 instead of scaling, in 8."""
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture, dtype=np.float64) / 257  # 65535 is white
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def left_out(folder: Path) -> list[str]:
    """Names of a folder's entries that look like pictures or have a caption, and are not read: other formats,
    and what is called like a picture and is no file."""
    special = [p.name for p in _listed(folder) if p.suffix.lower() in PICTURE_ENDINGS and not p.is_file()]
    others = (p for p in _files(folder) if p.suffix.lower() not in (*PICTURE_ENDINGS, *CAPTION_ENDINGS))
    return special + [
        p.name for p in others if p.suffix.lower() in OTHER_PICTURES or _caption_file(p) is not None
    ]


def _flatten(picture: Image.Image) -> Image.Image:
    """RGB; what was transparent becomes white instead of whatever colour lay hidden there."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def load_pictures(examples: list[Example], width: int, height: int) -> Tensor:
    """All pictures, (N, 3, height, width)."""
    return torch.stack([load_picture(e.path, width, height) for e in examples])
