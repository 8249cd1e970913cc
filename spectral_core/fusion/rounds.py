"""Fusing in rounds: look at each concept alone, fuse, look again under what was fused, fuse again.

The layers of a fused model do not get what they got when each concept was drawn with its own adapter, because
every layer before them has changed. So later rounds watch every concept under the fused adapter and add what
they see to what was seen before, as dataset aggregation does for imitators (Ross et al., AISTATS 2011, arXiv
1011.0686). To forget the earlier rounds instead makes the result swing from round to round (docs/fusion.md).

Shapes: those of :mod:`..statistics.moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..statistics.moments import Statistics, pooled
from . import Fused

ROUNDS = 2  # a third gains a third as much again (docs/fusion.md)

ByConcept = Sequence[Mapping[str, Statistics]]
Look = Callable[["Adapter | None"], ByConcept]
"""The statistics of every concept, drawn with its own adapter, or all of them with the one that is given."""


@dataclass(frozen=True)
class InRounds:
    """What came out of the last round, and the statistics of all rounds together, which lead to it."""

    fused: Fused
    statistics: ByConcept


def check_rounds(rounds: int) -> None:
    """Raises SpectralAdapterError for anything but a whole number of at least 1."""
    if not isinstance(rounds, int) or rounds < 1:
        raise SpectralAdapterError(f"{rounds!r} rounds: expected a whole number of at least 1")


def fuse_in_rounds(look: Look, fuse_once: Callable[[ByConcept], Fused], rounds: int = ROUNDS) -> InRounds:
    """``rounds`` looks and as many fusions; one round is the plain fusion.

    Peak memory: the statistics of two rounds.
    """
    check_rounds(rounds)
    seen = look(None)
    fused = fuse_once(seen)
    for _ in range(rounds - 1):
        again = look(fused.adapter)
        seen = [pooled(before, now) for before, now in zip(seen, again, strict=True)]
        fused = fuse_once(seen)
    return InRounds(fused, seen)
