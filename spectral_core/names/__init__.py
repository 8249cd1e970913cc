"""A layer's name, its spellings in other programs, and the numbers of a UNet's blocks."""

from .layer_name import LayerName, matches
from .spellings import from_kohya, from_native, to_kohya, to_native
from .unet_blocks import UNetLayout

__all__ = [
    "LayerName",
    "UNetLayout",
    "from_kohya",
    "from_native",
    "matches",
    "to_kohya",
    "to_native",
]
