"""Pictures between Pillow and the host: IMAGE tensors, and previews on a node.

Shapes: IMAGE (B, H, W, 3), float32 in 0 … 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor


def to_image(picture: Image) -> Tensor:
    """A Pillow picture as an IMAGE of one."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


def to_picture(image: Tensor) -> Image:
    """The first picture of an IMAGE, as Pillow's."""
    from PIL import Image as pillow

    pixels = (image[0, ..., :3].detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return pillow.fromarray(pixels.numpy())


def add_cover(file: Path, image: Tensor | None) -> str:
    """The IMAGE as the cover of a new file, where one is connected; a line for the report."""
    if image is None:
        return ""
    from ..spectral_core.files.cover import write_cover

    return f"cover: {write_cover(file, to_picture(image)).name}"


def preview(picture: Image, stem: str) -> dict[str, Any]:
    """The picture for the page to show on the node: ``ui`` entries; nothing outside the host."""
    from ..spectral_core.plots import save_picture
    from .host.files import paths

    path = paths.new_preview(stem)
    if path is None:
        return {}
    save_picture(picture, path)
    return {"images": ({"filename": path.name, "subfolder": "", "type": "temp"},)}
