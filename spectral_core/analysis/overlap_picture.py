"""How much adapters get into each other's way, as one picture: before a fusion, and what is kept after it.

Two adapters that read the same input directions of a layer react to the same things; two that write the same
output directions change the same things. 1 is all of them, 0 none; adapters that know nothing of each other
share about rank / width. Which of them bleed into which is measured on the layers' inputs where there are
statistics of them, and predicted from the weights where not.

Shapes: concepts × concepts, and blocks × pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from PIL import Image

from ..adapter.adapter import Adapter
from ..fusion import FusionReport, freeze
from ..fusion.sources import labels_of
from ..plots import heatmap
from ..plots.compose import page
from ..statistics.moments import Statistics
from .findings_picture import place_of, side_of_block
from .interference import LayerOverlap
from .interference_report import Interference, measure

_TITLE = "How much the adapters overlap"


def examine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    statistics: Sequence[Mapping[str, Statistics]] | None = None,
) -> Interference:
    """Overlap and bleed of the adapters at these weights; without statistics adaptive gates count as they
    were open in training.

    Raises SpectralAdapterError for layers of different shapes.
    """
    if statistics is None:
        return measure([freeze(adapter) for adapter in adapters], None, weights)
    return measure(adapters, statistics, weights)


def draw(
    adapters: Sequence[Adapter], found: Interference | None = None, fused: FusionReport | None = None
) -> Image.Image:
    """The sheet for two or more adapters. found: by :func:`examine`; fused: adds what each concept keeps."""
    found = examine(adapters) if found is None else found
    overlaps, labels = found.overlaps, labels_of(adapters)
    if not overlaps:
        return page(_TITLE, ["No layer is changed by two of them: their weights cannot overlap."], [])
    pictures = [
        found.pictures()["bleed"],
        *([] if fused is None else _retention(fused)),
        _matrix(overlaps, labels, "row", "Shared input directions"),
        _matrix(overlaps, labels, "column", "Shared output directions"),
        _blocks(overlaps, labels, "row", "Shared input directions by block"),
        _blocks(overlaps, labels, "column", "Shared output directions by block"),
    ]
    lines = [*map(str, found.warnings[:4]), *_lines(overlaps, labels)]
    return page(_TITLE, lines, pictures)


def _retention(fused: FusionReport) -> list[Image.Image]:
    """Blocks × concepts: what the fusion keeps of each on its own inputs, squares summed over a block first;
    nothing without statistics."""
    names = [c.name for c in fused.concepts]
    layers = [layer for layer in fused.layers if any(k.had for k in layer.kept)]
    if not layers:
        return []
    ordered = sorted(layers, key=lambda layer: side_of_block(layer.name))
    blocks = list(dict.fromkeys(place_of(layer.name)[0] for layer in ordered))
    cells: list[list[float | None]] = [[c.retention for c in fused.concepts]]
    for block in blocks:
        here = [k for layer in layers if place_of(layer.name)[0] == block for k in layer.kept]
        row: list[float | None] = []
        for name in names:
            had = sum(k.had for k in here if k.concept == name)
            lost = sum(k.lost for k in here if k.concept == name)
            row.append(1 - (lost / had) ** 0.5 if had else None)
        cells.append(row)
    title = f"What {fused.method} keeps of each concept on its own inputs"
    return [heatmap(cells, ["all layers", *blocks], names, title, "{:.0%}", "kept", high=1.0)]


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
