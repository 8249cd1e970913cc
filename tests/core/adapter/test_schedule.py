"""Schedule: linear between its points, constant beyond, a step where two points meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError


@pytest.mark.parametrize(
    ("points", "progress", "multiplier"),
    [
        (((0.0, 1.0),), 0.7, 1.0),
        (((0.2, 0.0), (0.6, 2.0)), 0.1, 0.0),
        (((0.2, 0.0), (0.6, 2.0)), 0.3, 0.5),
        (((0.2, 0.0), (0.6, 2.0)), 0.6, 2.0),
        (((0.2, 0.0), (0.6, 2.0)), 1.5, 2.0),
        (((0.0, 1.0), (0.5, 1.0), (0.5, -1.0)), 0.5, -1.0),
        (((0.0, 1.0), (0.5, 1.0), (0.5, -1.0)), 0.499, 1.0),
    ],
)
def test_at(points: tuple[tuple[float, float], ...], progress: float, multiplier: float) -> None:
    assert Schedule(points).at(progress) == pytest.approx(multiplier)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-0.5, 1.5))
def test_window(a: float, b: float, progress: float) -> None:
    start, end = min(a, b), max(a, b)
    if start == end:
        with pytest.raises(SpectralAdapterError, match="start < end"):
            Schedule.window(start, end)
        return
    inside = (start <= progress or start == 0) and (progress < end or end == 1)
    assert Schedule.window(start, end).at(progress) == float(inside)


@pytest.mark.parametrize(
    "points", [(), ((0.5, 1.0), (0.2, 1.0)), ((-0.1, 1.0),), ((1.1, 1.0),), ((0.5, float("nan")),)]
)
def test_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(SpectralAdapterError, match="schedule points"):
        Schedule(points)


def test_a_progress_that_is_no_number() -> None:
    with pytest.raises(SpectralAdapterError, match="not a number"):
        Schedule.window(0.1, 0.2).at(float("nan"))
