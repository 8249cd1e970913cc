"""What is alike, together: many small tensors cost mostly their calls, so those of one shape are computed at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items in groups of one key each, in the order in which each key and each item first came.

    >>> alike([1, 2, 3, 4, 5], lambda n: n % 2)
    [[1, 3, 5], [2, 4]]
    """
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())
