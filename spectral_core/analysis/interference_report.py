"""Before a fusion: who will bleed into whom, where, and how that is known; as text, JSON and pictures.

    found = measure(adapters)                    # from the weights alone
    found = measure(adapters, statistics)        # and on each concept's own inputs

Bleed of j into i is the crosstalk ‖ΔW_j X_i‖/‖ΔW_i X_i‖: how much concept j does where only i is wanted,
beside what i does itself. Without statistics it is predicted by the affinity of the two updates, which takes
concept i's inputs to be what its own update responds to (:mod:`.interference`).

Shapes: matrices are concept × concept, row i the inputs' concept, column j whose update acts on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean
from typing import Any

from PIL import Image

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..plots import heatmap
from ..statistics.moments import Statistics
from ..words import OneLine
from .interference import Crosstalk, LayerOverlap, affinity, crosstalk, overlap

BLEED = 0.3
"""Crosstalk over all layers from which a pair is warned of."""
WORST_LAYERS = 3


@dataclass(frozen=True)
class Bleed:
    """``from_concept`` acts on ``into_concept``'s inputs at ``strength`` times what that does itself.

    ``measured`` on activations, else predicted from the weights. worst: (layer, the same ratio there).
    """

    from_concept: str
    into_concept: str
    strength: float
    measured: bool
    worst: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        layers = ", ".join(f"{name} ({value:.2f})" for name, value in self.worst)
        how = "does" if self.measured else "is predicted to do"
        return (
            f"{self.from_concept} will bleed into {self.into_concept}: on {self.into_concept}'s inputs it "
            f"{how} {self.strength:.2f} of what {self.into_concept} does; worst in {layers}"
        )


@dataclass(frozen=True, repr=False)
class Interference(OneLine):
    """What adapters will do to each other. ``crosstalk`` only where there were statistics."""

    concepts: tuple[str, ...]
    overlaps: tuple[LayerOverlap, ...]
    affinity: Crosstalk
    crosstalk: Crosstalk | None
    warnings: tuple[Bleed, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {
            "concepts": list(self.concepts),
            "overlaps": [
                {
                    "layer": o.layer,
                    "pair": [self.concepts[o.first], self.concepts[o.second]],
                    "ranks": list(o.ranks),
                    "row": o.row,
                    "row_random": o.row_random,
                    "column": o.column,
                    "column_random": o.column_random,
                }
                for o in self.overlaps
            ],
            "affinity": _plain(self.affinity),
            "crosstalk": None if self.crosstalk is None else _plain(self.crosstalk),
            "warnings": [
                {
                    "from": w.from_concept,
                    "into": w.into_concept,
                    "strength": w.strength,
                    "measured": w.measured,
                    "worst": [list(pair) for pair in w.worst],
                }
                for w in self.warnings
            ],
        }

    @property
    def table(self) -> list[list[float | None]]:
        """What column j does on row i's inputs, of what i does itself: measured where that is known."""
        known = self.crosstalk or self.affinity
        return [[None if value is None else round(value, 3) for value in row] for row in known.total]

    @property
    def text(self) -> str:
        """A few lines for a terminal or a node."""
        lines = [f"{len(self.concepts)} concepts: {', '.join(self.concepts)}"]
        for (i, j), found in self._pairs().items():
            row, column = fmean(o.row for o in found), fmean(o.column for o in found)
            chance = fmean(o.row_random for o in found), fmean(o.column_random for o in found)
            lines.append(
                f"{self.concepts[i]} and {self.concepts[j]}: rows overlap {row:.1%} (chance "
                f"{chance[0]:.1%}), columns {column:.1%} (chance {chance[1]:.1%}) over {len(found)} layers"
            )
        known = self.crosstalk or self.affinity
        what = "crosstalk on activations" if self.crosstalk else "crosstalk predicted from the weights"
        lines += [
            f"{what}: {self.concepts[j]} on {self.concepts[i]} {value:.2f}" for i, j, value in _ordered(known)
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def _pairs(self) -> dict[tuple[int, int], list[LayerOverlap]]:
        found: dict[tuple[int, int], list[LayerOverlap]] = {}
        for o in self.overlaps:
            found.setdefault((o.first, o.second), []).append(o)
        return found

    def __str__(self) -> str:
        return self.text

    def pictures(self) -> dict[str, Image.Image]:
        """``bleed``: concept × concept; ``bleed_by_layer`` and ``overlap_by_layer``: layers × pairs."""
        known = self.crosstalk or self.affinity
        how = "measured on activations" if self.crosstalk else "predicted from the weights"
        on = [f"on {name}'s inputs" for name in self.concepts]
        pictures = {
            "bleed": heatmap(
                known.total,
                on,
                list(self.concepts),
                f"What each concept does, {how}",
                "{:.2f}",
                "of its own",
                low=0.0,
            )
        }
        pairs = list(permutations(range(len(self.concepts)), 2))
        names = [f"{self.concepts[j]} on {self.concepts[i]}" for i, j in pairs]
        by_layer = {n: [rows[i][j] for i, j in pairs] for n, rows in known.layers.items()}
        by_layer = {n: row for n, row in by_layer.items() if any(v is not None for v in row)}
        if by_layer:
            pictures["bleed_by_layer"] = heatmap(
                list(by_layer.values()),
                list(by_layer),
                names,
                f"Crosstalk by layer, {how}",
                "{:.2f}",
                low=0.0,
            )
        if self.overlaps:
            pictures["overlap_by_layer"] = self._overlap_picture()
        return pictures

    def _overlap_picture(self) -> Image.Image:
        pairs = list(self._pairs())
        layers = list(dict.fromkeys(o.layer for o in self.overlaps))
        found = {(o.layer, o.first, o.second): o for o in self.overlaps}
        matrix = []
        for layer in layers:
            here = [found.get((layer, i, j)) for i, j in pairs]
            matrix.append([v for o in here for v in ((o.row, o.column) if o else (None, None))])
        names = [
            f"{self.concepts[i]}, {self.concepts[j]}: {side}"
            for i, j in pairs
            for side in ("rows", "columns")
        ]
        return heatmap(matrix, layers, names, "Shared directions of the updates", "{:.2f}", "cos²", low=0.0)


def measure(
    adapters: Sequence[Adapter],
    statistics: Sequence[Mapping[str, Statistics]] | None = None,
    weights: Sequence[float] | None = None,
    threshold: float = BLEED,
) -> Interference:
    """Overlaps, predicted and (with ``statistics``, one mapping per adapter) measured crosstalk, warnings.

    weights: those of the fusion to come, 1 by default. threshold: crosstalk from which a pair is warned of.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or len(adapters) < 2:
        raise SpectralAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters: expected at least two, a weight for each"
        )
    scaled = [adapter.scaled(weight) for adapter, weight in zip(adapters, weights, strict=True)]
    names = _labels(adapters)
    seen = None if statistics is None else crosstalk(scaled, statistics)
    predicted = affinity(scaled)
    known = predicted if seen is None else seen
    return Interference(
        concepts=tuple(names),
        overlaps=tuple(overlap(scaled)),
        affinity=predicted,
        crosstalk=seen,
        warnings=tuple(
            Bleed(names[j], names[i], value, seen is not None, _worst(known, i, j))
            for i, j, value in _ordered(known)
            if value >= threshold
        ),
    )


def _labels(adapters: Sequence[Adapter]) -> list[str]:
    from ..fusion.sources import labels_of

    return labels_of(adapters)


def _ordered(known: Crosstalk) -> list[tuple[int, int, float]]:
    """(i, j, crosstalk of j on i) of all pairs, the strongest first."""
    pairs = permutations(range(len(known.total)), 2)
    found = [(i, j, value) for i, j in pairs if (value := known.total[i][j]) is not None]
    return sorted(found, key=lambda entry: -entry[2])


def _worst(known: Crosstalk, i: int, j: int) -> tuple[tuple[str, float], ...]:
    found = [(name, value) for name, rows in known.layers.items() if (value := rows[i][j]) is not None]
    return tuple(sorted(found, key=lambda entry: -entry[1])[:WORST_LAYERS])


def _plain(found: Crosstalk) -> dict[str, Any]:
    return {
        "total": [list(row) for row in found.total],
        "layers": {name: [list(row) for row in rows] for name, rows in found.layers.items()},
    }
