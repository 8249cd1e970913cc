"""What a run is told: every setting with its type, default, range and words, in one table."""

from .config import TrainConfig

__all__ = [
    "TrainConfig",
]
