"""Which concept holds which singular columns, and where they collide.

Concepts in disjoint columns of one base fuse without cross terms (arXiv 2405.13952); concept k takes the
block [k·r, (k+1)·r), counted from the largest singular value.

Shapes: columns are indices, 0 the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ..adapter.adapter import Adapter, AdapterLayer


@dataclass(frozen=True)
class ColumnUse:
    """``layers`` layers of a concept use exactly these columns."""

    concept: str
    columns: tuple[int, ...]
    layers: int

    def __str__(self) -> str:
        return f"{self.concept}: columns {ranges(self.columns)} in {self.layers} layers"


def columns_of(layer: AdapterLayer) -> tuple[int, ...]:
    """The singular columns that a layer's terms use, ascending; empty without spectral terms."""
    return tuple(sorted({c for term in layer.terms for c in term.config.singular_columns}))


def column_uses(labels: Sequence[str], adapters: Sequence[Adapter]) -> tuple[ColumnUse, ...]:
    """Who holds what, one entry for each different set of columns of a concept."""
    uses: list[ColumnUse] = []
    for label, adapter in zip(labels, adapters, strict=True):
        counts = Counter(columns_of(layer) for layer in adapter.layers.values())
        uses.extend(
            ColumnUse(label, columns, layers) for columns, layers in sorted(counts.items()) if columns
        )
    return tuple(uses)


def overlap_warnings(labels: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """One line for each pair of concepts that share columns in some layer."""
    warnings = []
    for (label_a, a), (label_b, b) in combinations(list(zip(labels, adapters, strict=True)), 2):
        shared: set[int] = set()
        layers = 0
        for name in (name for name in a.layers if name in b.layers):
            common = set(columns_of(a.layers[name])) & set(columns_of(b.layers[name]))
            shared |= common
            layers += bool(common)
        if shared:
            warnings.append(
                f"{label_a} and {label_b} share columns {ranges(tuple(sorted(shared)))} in {layers} layers "
                "and will mix there; train them in disjoint columns to keep them apart"
            )
    return warnings


def ranges(columns: Sequence[int]) -> str:
    """``0–7, 16`` for ascending indices."""
    runs: list[list[int]] = []
    for column in columns:
        if runs and column == runs[-1][1] + 1:
            runs[-1][1] = column
        else:
            runs.append([column, column])
    return ", ".join(f"{a}–{b}" if b > a else str(a) for a, b in runs)
