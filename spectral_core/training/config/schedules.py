"""Learning-rate schedules: the multiplier of the peak rate, after a linear warm-up.

A schedule is a pure function of the step, so resuming a run needs nothing but the step at which it began.
"""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "cosine", "linear"]


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Multiplier at a step (from 0) of a schedule over ``steps`` steps: warm-up 1/warmup … 1, then
    constant, or falling to 0 along a line or half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    through = (step - warmup) / max(1, steps - warmup)
    return 1.0 - through if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * through))
