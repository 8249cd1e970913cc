"""Checks and clean-up of what is to be plotted.

Missing values become NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import SpectralAdapterError


def check_labels(labels: Sequence[str], count: int, what: str) -> None:
    if labels and len(labels) != count:
        raise SpectralAdapterError(
            f"{len(labels)} {what} labels for {count} {what}s: expected one for each or none"
        )


def finite(value: Any) -> float:
    """A finite float, or NaN for everything that is missing."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def mean(values: Sequence[float]) -> float:
    """The mean of what is not missing; NaN where all is."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
