"""Numbers from the kept cells: means with spreads, paired differences and what may be said of them.

Spread: the standard deviation over seeds. A difference is paired by seed; it counts when its mean is
further from zero than twice its standard error, which is the smallest difference that could have been seen.
Where that is more than the paper's own, a difference that does not show decides nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from benchmarks.claims.lab import PROTOCOL, Lab

SHOWS, OPPOSITE, OPEN = "shows", "the opposite shows", "does not show"
UNDECIDED = "not decidable here"
OPEN_ENDED = "not decidable here: still better at the largest strength tried"
NOT_RUN = "not run"
CERTAIN = 2.0  # standard errors
FEWEST = 3  # seeds of a verdict


def few(seeds: int) -> str:
    """What stands in place of a verdict on so few seeds; nothing where they are enough."""
    if not seeds:
        return NOT_RUN
    return f"too few seeds ({seeds})" if seeds < FEWEST else ""


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        return stdev(self.values) if len(self.values) > 1 else math.nan

    def text(self, digits: int = 3) -> str:
        if not self.values:
            return "–"
        spread = "" if math.isnan(self.spread) else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    @property
    def visible(self) -> float:
        """The smallest mean of such differences that would have shown; nan on too few seeds."""
        return math.nan if few(len(self.values)) else CERTAIN * self.spread / math.sqrt(len(self.values))

    def seen(self, digits: int = 3) -> str:
        """The same, for a table."""
        return "–" if math.isnan(self.visible) else f"{self.visible:.{digits}f}"

    def verdict(self, paper: float | None = None) -> str:
        """Of a difference that a claim says is above zero. paper: how large it is there, in the same unit."""
        if few(len(self.values)):
            return few(len(self.values))
        if self.mean > self.visible:
            return SHOWS
        if self.mean < -self.visible:
            return OPPOSITE
        return UNDECIDED if paper is not None and self.visible > paper else OPEN


@dataclass(frozen=True)
class Part:
    """One sentence of a claim: what was compared, its value, the smallest that could have been seen, and what
    follows. detail: on the claim's own page only."""

    what: str
    value: str
    visible: str = "–"
    verdict: str = ""
    detail: bool = False


def part(what: str, mean: Mean, digits: int = 3, paper: float | None = None, detail: bool = False) -> Part:
    """Of a paired difference. paper: the paper's, in the same unit."""
    return Part(what, mean.text(digits), mean.seen(digits), mean.verdict(paper), detail)


class Figures:
    """What the lab has made so far, by cell name with ``{seed}`` in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.seconds = 0.0

    def cells(self, name: str) -> dict[int, dict[str, Any]]:
        """Seed -> the cell, where it is there."""
        found = {seed: self.lab.known(name.format(seed=seed)) for seed in self.lab.setting.seeds}
        return {seed: cell for seed, cell in found.items() if cell is not None}

    def mean(self, name: str, read: Callable[[Mapping[str, Any]], float | None]) -> Mean:
        """Over the seeds that have the cell and a number in it."""
        values = [read(cell) for cell in self.cells(name).values()]
        return Mean(tuple(v for v in values if v is not None and math.isfinite(v)))

    def difference(self, first: str, second: str, read: Callable[[Mapping[str, Any]], float | None]) -> Mean:
        """first − second, seed by seed."""
        one, other = self.cells(first), self.cells(second)
        pairs = [(read(one[s]), read(other[s])) for s in one if s in other]
        return Mean(tuple(a - b for a, b in pairs if a is not None and b is not None))

    def rates(self, name: str) -> str:
        """The learning rates of the cells, as far as they say so."""
        found = {cell["rate"] for cell in self.cells(name).values() if "rate" in cell}
        return ", ".join(f"{rate:g}" for rate in sorted(found)) or "–"

    def outdated(self, name: str) -> bool:
        """Whether some of these cells were made before what is measured now (:data:`.lab.PROTOCOL`)."""
        return any(cell.get("protocol", 1) < PROTOCOL for cell in self.cells(name).values())

    def cpu_seconds(self, prefix: str) -> float:
        """Processor seconds of every cell whose name begins so, with the trainings it made."""
        return sum(float(cell.get("cpu_seconds", 0.0)) for cell in self.lab.all_known(prefix).values())


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """y at x on the line through the points sorted by x; None outside."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines)
