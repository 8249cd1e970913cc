"""How much adapters get into each other's way, as one picture, from their weights alone.

Two adapters that read the same input directions of a layer react to the same things; two that write the same
output directions change the same things. 1 is all of them, 0 none; adapters that know nothing of each other
share about rank / width.

Shapes: concepts × concepts, and blocks × pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from PIL import Image

from .adapter import Adapter
from .findings_sheet import place_of, side_of_block
from .fusion import freeze
from .fusion.sources import labels_of
from .interference import LayerOverlap, overlap
from .plots import heatmap
from .plots.compose import page

_TITLE = "How much the adapters overlap"


def draw(adapters: Sequence[Adapter]) -> Image.Image:
    """The sheet for two or more adapters; adaptive gates count as they were open in training.

    Raises SpectralAdapterError for layers of different shapes.
    """
    found = overlap([freeze(adapter) for adapter in adapters])
    labels = labels_of(adapters)
    if not found:
        return page(
            _TITLE, ["No layer is changed by two of them: they cannot get into each other's way."], []
        )
    pictures = [
        _matrix(found, labels, "row", "Shared input directions"),
        _matrix(found, labels, "column", "Shared output directions"),
        _blocks(found, labels, "row", "Shared input directions by block"),
        _blocks(found, labels, "column", "Shared output directions by block"),
    ]
    return page(_TITLE, _lines(found, labels), pictures)


def _lines(found: Sequence[LayerOverlap], labels: Sequence[str]) -> list[str]:
    lines = []
    for i, j in _pairs(found):
        here = [o for o in found if (o.first, o.second) == (i, j)]
        inputs, outputs = fmean(o.row for o in here), fmean(o.column for o in here)
        by_chance = fmean(o.row_random for o in here), fmean(o.column_random for o in here)
        lines.append(
            f"{labels[i]} and {labels[j]}: {inputs:.0%} of the input directions are shared (by chance "
            f"{by_chance[0]:.0%}), {outputs:.0%} of the output directions (by chance {by_chance[1]:.0%}), in "
            f"{len(here)} layers"
        )
    return lines


def _pairs(found: Sequence[LayerOverlap]) -> list[tuple[int, int]]:
    return sorted({(o.first, o.second) for o in found})


def _matrix(found: Sequence[LayerOverlap], labels: Sequence[str], side: str, title: str) -> Image.Image:
    cells: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    for i in range(len(labels)):
        cells[i][i] = 1.0
    for i, j in _pairs(found):
        here = [float(getattr(o, side)) for o in found if (o.first, o.second) == (i, j)]
        cells[i][j] = cells[j][i] = fmean(here)
    return heatmap(cells, labels, labels, title, "{:.0%}", "shared", low=0.0, high=1.0)


def _blocks(found: Sequence[LayerOverlap], labels: Sequence[str], side: str, title: str) -> Image.Image:
    pairs = _pairs(found)
    blocks = list(
        dict.fromkeys(place_of(o.layer)[0] for o in sorted(found, key=lambda o: side_of_block(o.layer)))
    )
    cells: list[list[float | None]] = []
    for block in blocks:
        row: list[float | None] = []
        for pair in pairs:
            here = [
                float(getattr(o, side))
                for o in found
                if place_of(o.layer)[0] == block and (o.first, o.second) == pair
            ]
            row.append(fmean(here) if here else None)
        cells.append(row)
    names = [f"{labels[i]} + {labels[j]}" for i, j in pairs]
    return heatmap(cells, blocks, names, title, "{:.0%}", "shared", low=0.0)
