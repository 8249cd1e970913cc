"""What layers see while a model runs: second moments of their inputs, collected, kept and read again."""

from .collect import Collector
from .moments import Statistics

__all__ = [
    "Collector",
    "Statistics",
]
