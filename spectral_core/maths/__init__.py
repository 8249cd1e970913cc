"""Shapes and low-rank factors, transforms, singular columns and rotations; nothing here knows an adapter."""

from .layers import LayerShape
from .lowrank import Factors, delta
from .svd import Columns, SVDColumns, select_columns
from .svd_cache import SVDCache

__all__ = [
    "Columns",
    "Factors",
    "LayerShape",
    "SVDCache",
    "SVDColumns",
    "delta",
    "select_columns",
]
