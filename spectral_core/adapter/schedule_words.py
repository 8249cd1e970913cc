"""Strength schedules by name or by a list in words, and their product.

Cosine curves are drawn with 64 straight pieces: at most 6e-4 from the curve itself. Outside of its window a
curve is 0, as an adapter that is not there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import pairwise

from ..errors import SpectralAdapterError
from ..words import expected
from .schedule import MOST_POINTS, Schedule

_PIECES = 64

# Over the window, 0 at its start and 1 at its end: the multiplier.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear in": lambda x: x,
    "linear out": lambda x: 1.0 - x,
    "cosine in": lambda x: (1.0 - math.cos(math.pi * x)) / 2,
    "cosine out": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
    "bell": lambda x: (1.0 - math.cos(2 * math.pi * x)) / 2,
}
CUSTOM = "custom"


def named(curve: str, start: float = 0.0, end: float = 1.0, points: str = "") -> Schedule | None:
    """The schedule of a curve between two places of the denoising, 0 noisiest … 1 cleanest.

    None where it is 1 everywhere, so that the adapter stays mergeable. ``points`` is for the curve
    ``custom``, see :func:`parse`; its places are of the whole denoising, and the window cuts it.

    Raises SpectralAdapterError for an unknown curve, an empty window, and a list that cannot be read.
    """
    if curve not in CURVES and curve != CUSTOM:
        raise SpectralAdapterError(f"curve {curve!r}: {expected(curve, [*CURVES, CUSTOM])}")
    if not 0 <= start < end <= 1:
        raise SpectralAdapterError(
            f"a window from {start:g} to {end:g}: expected a start below the end, both from 0 to 1"
        )
    if curve == CUSTOM:
        found = parse(points)
        return found if (start, end) == (0, 1) else product(found, Schedule.window(start, end))
    if curve == "constant":
        return None if (start, end) == (0, 1) else Schedule.window(start, end)
    pieces = 1 if curve.startswith("linear") else _PIECES
    shape = CURVES[curve]
    inside = [(start + (end - start) * i / pieces, shape(i / pieces)) for i in range(pieces)]
    return Schedule(_cut([*inside, (end, shape(1.0))], start, end))


def _cut(inside: list[tuple[float, float]], start: float, end: float) -> tuple[tuple[float, float], ...]:
    """The points with a step down to 0 at each end of the window that is not an end of the denoising."""
    head = [(start, 0.0)] if start > 0 else []
    tail = [(end, 0.0)] if end < 1 else []
    return tuple(_without_doubles([*head, *inside, *tail]))


def parse(text: str) -> Schedule:
    """``0:1, 0.5:0.3, 1:0``: places and multipliers, by commas, semicolons or lines; linear between.

    Raises SpectralAdapterError that quotes the entry that cannot be read.
    """
    entries = [entry.strip() for entry in text.replace(";", ",").replace("\n", ",").split(",")]
    if len(entries) > MOST_POINTS:
        raise SpectralAdapterError(f"custom curve of {len(entries)} points: at most {MOST_POINTS} are used")
    points = [_point(entry) for entry in entries if entry]
    if not points:
        raise SpectralAdapterError(
            "the custom curve is empty: expected points such as 0:1, 0.5:0.3, 1:0 (place:strength)"
        )
    return Schedule(tuple(points))


def _point(entry: str) -> tuple[float, float]:
    place, _, multiplier = entry.partition(":")
    try:
        return float(place), float(multiplier)
    except ValueError:
        raise SpectralAdapterError(
            f"custom curve: {entry!r:.80} is no point; expected place:strength, such as 0.5:0.3"
        ) from None


def product(first: Schedule, second: Schedule) -> Schedule:
    """Both at once. Exact where one of them is constant; where both slope, their product is a parabola and
    drawn with 16 straight pieces: within |Δ₁·Δ₂|/1024 for pieces that change by Δ₁ and Δ₂.
    """
    places = sorted({0.0, 1.0, *(p for s in (first, second) for p, _ in s.points)})
    points: list[tuple[float, float]] = []
    for left, right in pairwise(places):
        a, b = (_ends(schedule, left, right) for schedule in (first, second))
        pieces = 1 if a[0] == a[1] or b[0] == b[1] else 16
        for i in range(pieces + 1):
            x = i / pieces
            value = (a[0] + (a[1] - a[0]) * x) * (b[0] + (b[1] - b[0]) * x)
            points.append((left + (right - left) * x if i < pieces else right, value))
    last = first.at(1.0) * second.at(1.0)
    return Schedule(tuple(_without_doubles([*points, (1.0, last)])))


def _ends(schedule: Schedule, left: float, right: float) -> tuple[float, float]:
    """The multipliers just after ``left`` and just before ``right``, between which the schedule is linear."""
    first = bisect_left(schedule.points, right, key=lambda point: point[0])
    is_point = first < len(schedule.points) and schedule.points[first][0] == right
    return schedule.at(left), schedule.points[first][1] if is_point else schedule.at(right)


def _without_doubles(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or kept[-1] != point:
            kept.append(point)
    return kept


def describe(schedule: Schedule | None) -> str:
    """A schedule in a few words: its multiplier at five places."""
    if schedule is None:
        return "no schedule: the same strength at every step"
    shown = ", ".join(f"{schedule.at(p):.3g} at {p:g}" for p in (0.0, 0.25, 0.5, 0.75, 1.0))
    return f"strength over the denoising (0 noisiest, 1 cleanest; text encoders take none): {shown}"
