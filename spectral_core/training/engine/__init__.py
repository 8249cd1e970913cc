"""The loop itself: optimisers, steps that can be undone, checks, and gates while they learn."""

from .loop import train

__all__ = [
    "train",
]
