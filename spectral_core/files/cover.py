"""The cover of a file: ``<name>.preview.png`` beside it, where ComfyUI's model browser, LoRA managers and the
webuis look.

Shapes: none; pictures.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SpectralAdapterError
from ..whole_file import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

COVERS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".preview.webp", ".webp")
SIDE = 512  # pixels at most: a card shows less


def cover_of(file: Path) -> Path | None:
    """The picture beside a file, if there is one."""
    beside = (file.with_name(file.stem + end) for end in COVERS)
    return next((path for path in beside if path.is_file()), None)


def write_cover(file: Path, picture: Image) -> Path:
    """The picture as the file's cover; one that lies there stays. Returns its path.

    Raises SpectralAdapterError where the folder cannot be written to.
    """
    if found := cover_of(file):
        return found
    path = file.with_name(file.stem + COVERS[0])
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "png")
    try:
        with whole_file(path, overwrite=False) as stream:
            stream.write(content.getvalue())
    except FileExistsError:
        return path
    except OSError as error:
        raise SpectralAdapterError(f"{path}: the cover could not be written: {error}") from error
    return path


def copy_cover(source: Path, target: Path) -> Path | None:
    """The cover of ``source``, if it has one that can be read, for ``target`` too."""
    found = cover_of(source)
    return None if found is None else copy_picture(found, target)


def copy_picture(found: Path, target: Path) -> Path | None:
    """A picture's file as the cover of ``target``; None where it cannot be read or written."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(found, formats=("PNG", "JPEG", "WEBP")) as picture:
            return write_cover(target, picture)
    except (OSError, SpectralAdapterError, UnidentifiedImageError, Image.DecompressionBombError):
        return None  # a broken picture is no reason to stop
