"""Pictures of numbers: contact sheet, heatmap, line plot; PIL images, the same for the same input.

Values that are missing (None, NaN, ±Inf) are drawn as marked gaps, never as numbers. Long names are
shortened in their middle; more rows than a page can show are averaged in groups, which the picture then
says.

Shapes: pictures are PIL images or tensors (3, H, W) in 0 … 1; matrices are rows × columns, lists or tensors.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..errors import SpectralAdapterError
from ..whole_file import whole_file
from .heatmap import abbreviate, heatmap
from .lines import line_plot
from .sheet import as_picture, contact_sheet

__all__ = ["abbreviate", "as_picture", "contact_sheet", "heatmap", "line_plot", "save_picture"]


def save_picture(image: Image.Image, path: str | Path) -> Path:
    """Write atomically, in the format of the suffix (.png, .jpg, .webp); an existing file is replaced."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise SpectralAdapterError(f"{path}: expected a name that ends in .png, .jpg or .webp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as stream:
            image.save(stream, Image.registered_extensions()[path.suffix.lower()], quality=92)
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path
