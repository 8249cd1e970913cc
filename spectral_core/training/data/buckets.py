"""Aspect buckets: pictures of different proportions train at sizes of about one area, hardly cropped.

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import SpectralAdapterError

MOST_EXTREME = 2.5  # the longest side over the shortest


def bucket_sizes(size: tuple[int, int], step: int, extreme: float = MOST_EXTREME) -> list[tuple[int, int]]:
    """Every (width, height) of multiples of ``step`` with at most the area of ``size``, widest-proportioned
    last: for each width the tallest that fits, between 1:extreme and extreme:1."""
    area = size[0] * size[1]
    if step < 1 or min(size) < step:
        raise SpectralAdapterError(
            f"buckets for size {size[0]}×{size[1]} in steps of {step} pixels: expected a size of at least "
            "one step"
        )
    side = math.sqrt(area)
    found = {(size[0] // step * step, size[1] // step * step)}
    for width in range(step, int(side * math.sqrt(extreme)) + 1, step):
        height = area // width // step * step
        if height >= step and max(width, height) <= extreme * min(width, height):
            found |= {(width, height), (height, width)}
    return sorted(found, key=lambda wh: (wh[0] / wh[1], wh))


def assign_buckets(
    pictures: Sequence[tuple[int, int]], size: tuple[int, int], step: int
) -> list[tuple[int, int]]:
    """For each picture's (width, height) the bucket of the nearest proportions."""
    sizes = bucket_sizes(size, step)

    def nearest(picture: tuple[int, int]) -> tuple[int, int]:
        wanted = math.log(picture[0] / picture[1])
        # of several with one proportion the largest: it keeps most of the picture
        return min(sizes, key=lambda wh: (abs(math.log(wh[0] / wh[1]) - wanted), -wh[0] * wh[1]))

    return [nearest(picture) for picture in pictures]
