"""The experiments by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.claims import capacity, fusing, learning, styles
from benchmarks.claims.lab import Lab

Cells = list[tuple[str, Callable[[], Mapping[str, Any]]]]


class Experiment(NamedTuple):
    cells: Callable[[Lab], Cells]


EXPERIMENTS: Mapping[str, Experiment] = {
    "fusing": Experiment(fusing.cells),
    "styles": Experiment(styles.style_cells),
    "learning": Experiment(learning.cells),
    "columns": Experiment(capacity.column_cells),
    "merging": Experiment(styles.merging_cells),
    "exact": Experiment(capacity.exact_cells),
    "cost": Experiment(capacity.cost_cells),
    "copying": Experiment(styles.copying_cells),
    "budgets": Experiment(capacity.budget_cells),
    "gates": Experiment(styles.gate_cells),
}
