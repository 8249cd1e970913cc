"""Pictures and captions of a folder, the order in which steps show them, and caches of what was encoded."""

from .folder import Example, find_examples
from .order import Order

__all__ = [
    "Example",
    "Order",
    "find_examples",
]
