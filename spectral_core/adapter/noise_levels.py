"""How far the denoising is, from the noise level that the host's sampler is at.

0 is the noisiest and 1 the cleanest, as in the host's own nodes with a start and an end: the inverse of
``model_sampling.percent_to_sigma``, whatever kind of model that belongs to.

Shapes: sigma (B,), one per batch row.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_STEPS = 999  # a table this fine is exact for models of 1000 discrete steps: they are linear in log σ between
_EDGE = 1e-7  # at 0 and 1 themselves the host answers "everything" and "nothing"
_DIGITS = 5  # so that a step that the host would place exactly at a window's edge is not lost to rounding


class Table:
    """Progress of σ by the σ of each progress, with log σ linear between (σ itself where it reaches 0)."""

    def __init__(self, sigma_at: Callable[[float], float]) -> None:
        places = [min(max(i / _STEPS, _EDGE), 1 - _EDGE) for i in range(_STEPS + 1)]
        sigmas = [float(sigma_at(place)) for place in places]
        self._measure = math.log if min(sigmas) > 0 else float
        # ascending, for the search; equal neighbours stay and the search takes the later one
        self._levels = [-self._measure(sigma) for sigma in sigmas]

    def progress(self, sigma: float) -> float:
        if not sigma > 0:
            return 1.0
        level, levels = -self._measure(sigma), self._levels
        if level <= levels[0]:
            return 0.0
        if level >= levels[-1]:
            return 1.0
        i = bisect.bisect_right(levels, level)
        gap = levels[i] - levels[i - 1]
        return round((i - 1 + (level - levels[i - 1]) / gap) / _STEPS, _DIGITS)


# One table per noise schedule object, which the host replaces when a node changes the schedule.
_TABLES: Any = WeakIdKeyDictionary()


def progress_of(model_sampling: Any, sigma: Tensor) -> float | Tensor:
    """The progress of every row of σ (B,): one number where they agree, else a tensor (B,) on the CPU."""
    return progress_by(model_sampling, model_sampling.percent_to_sigma, sigma)


def progress_by(schedule: Any, sigma_at: Callable[[float], float], sigma: Tensor) -> float | Tensor:
    """As :func:`progress_of`, by the σ of each progress; asked once for every ``schedule`` object."""
    table: Table | None = _TABLES.get(schedule)
    if table is None:
        table = _TABLES[schedule] = Table(sigma_at)
    values = sigma.detach().flatten().tolist()
    if len(set(values)) == 1:
        return table.progress(values[0])
    return torch.tensor([table.progress(value) for value in values])
