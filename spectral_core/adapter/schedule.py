"""Strength over the denoising: a multiplier as a function of progress, 0 = noisiest … 1 = cleanest.

Progress is what users see in the host's own nodes (start 0.0, end 1.0). A pipeline or host maps its noise
level to it; with diffusers' 1000 steps, progress = 1 − t/999.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ..errors import SpectralAdapterError

MOST_POINTS = 4096
MOST_MULTIPLIER = 1e6


@dataclass(frozen=True)
class Schedule:
    """Points (progress, multiplier), progress ascending in [0, 1]; linear between, constant beyond the ends.

    Two points at one progress make a step; at the step itself the later point holds.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) > MOST_POINTS:
            raise SpectralAdapterError(
                f"a schedule of {len(self.points)} points: at most {MOST_POINTS} are used; leave some out"
            )
        places = [p for p, _ in self.points]
        if not places or places != sorted(places) or places[0] < 0 or places[-1] > 1:
            raise SpectralAdapterError(
                f"schedule points {self._shown}: expected (progress, multiplier), progress ascending in 0…1"
            )
        if not all(math.isfinite(p) and abs(m) <= MOST_MULTIPLIER for p, m in self.points):
            raise SpectralAdapterError(
                f"schedule points {self._shown}: expected finite numbers, multipliers of at most "
                f"{MOST_MULTIPLIER:g} either way"
            )

    @property
    def _shown(self) -> str:
        return f"{self.points!r:.200}"

    @classmethod
    def window(cls, start: float, end: float) -> Schedule:
        """1 for start ≤ progress < end (up to and including 1 when end is 1), 0 outside."""
        if not 0 <= start < end <= 1:
            raise SpectralAdapterError(f"schedule window {start}…{end}: expected 0 ≤ start < end ≤ 1")
        head = ((start, 0.0),) if start > 0 else ()
        tail = ((end, 1.0), (end, 0.0)) if end < 1 else ()
        return cls((*head, (start, 1.0), *tail))

    def at(self, progress: float) -> float:
        """The multiplier at one progress; below 0 and above 1 it is that of the ends."""
        if math.isnan(progress):
            raise SpectralAdapterError("progress is not a number: expected 0 (noisiest) to 1 (cleanest)")
        after = bisect_right(self.points, progress, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (p0, m0), (p1, m1) = self.points[after - 1], self.points[after]
        return m0 + (m1 - m0) * (progress - p0) / (p1 - p0)
