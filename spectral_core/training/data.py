"""Pictures with captions from a folder, in the layout that kohya's trainer and ComfyUI's dataset nodes read.

``name.jpg`` + ``name.txt`` (or ``.caption``) in the folder itself or in subfolders called
``<repeats>_<name>``. ``<TOK>`` in a caption stands for the concept's token; a caption that has neither gets
the token in front.

Shapes: a picture becomes (3, height, width) in [−1, 1], centre-cropped and resized with Lanczos.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import SpectralAdapterError

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_ENDINGS = (".txt", ".caption")
PLACEHOLDER = "<TOK>"
_REPEATS = re.compile(r"(\d+)_.+")


@dataclass(frozen=True)
class Example:
    """One picture file with its caption and how often an epoch shows it."""

    path: Path
    caption: str
    repeats: int = 1


def find_examples(folder: str | Path, token: str) -> list[Example]:
    """Every picture of a folder with its caption, in the order of names. Raises when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SpectralAdapterError(
            f"picture folder {folder}: not a folder; expected one with pictures and captions"
        )
    examples = [
        Example(path, caption_for(path, token), repeats)
        for sub, repeats in _picture_folders(folder)
        for path in sorted(sub.iterdir())
        if path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".")
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
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        if match := _REPEATS.fullmatch(sub.name):
            found.append((sub, max(1, int(match[1]))))
    return found


def caption_for(picture: Path, token: str) -> str:
    """The caption beside a picture with the token in it; without a caption file, ``a picture of <token>``."""
    for ending in CAPTION_ENDINGS:
        path = picture.with_suffix(ending)
        if path.is_file():
            return insert_token(_read_text(path), token)
    return f"a picture of {token}"


def insert_token(caption: str, token: str) -> str:
    """The caption with ``<TOK>`` replaced; the token goes in front where it does not occur."""
    caption = " ".join(caption.replace(PLACEHOLDER, token).split())
    if token in caption:
        return caption
    return f"{token}, {caption}" if caption else token


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpectralAdapterError(f"caption file {path}: not UTF-8 text; save it as UTF-8") from error


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """(3, height, width) in [−1, 1]: rotated as its EXIF says, transparency on white, cropped about its
    centre."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture = _flatten(picture)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SpectralAdapterError(
            f"picture {path}: cannot be read as a picture ({error}); remove or replace it"
        ) from error
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


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


class Order:
    """Which examples each step shows: seeded shuffles of the epoch (repeats included), one after the
    other."""

    def __init__(self, examples: list[Example], batch_size: int, seed: int) -> None:
        self._epoch = [i for i, e in enumerate(examples) for _ in range(e.repeats)]
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []

    def next(self) -> list[int]:
        """Indices of the next batch."""
        while len(self._queue) < self._batch_size:
            shuffled = torch.randperm(len(self._epoch), generator=self._generator).tolist()
            self._queue += [self._epoch[i] for i in shuffled]
        batch, self._queue = self._queue[: self._batch_size], self._queue[self._batch_size :]
        return batch
