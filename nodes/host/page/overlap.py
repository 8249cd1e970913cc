"""Whether adapters will get into each other's way, from their files alone, before anything runs.

Shapes: bleed is files × files, row i the inputs' concept, column j whose update acts on them.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch

from ....spectral_core.analysis.interference_report import BLEED, Interference
from ....spectral_core.analysis.overlap_picture import examine
from ....spectral_core.errors import SpectralAdapterError
from ..files import adapters

MOST = 12  # files at once


def verdict(files: tuple[str, ...]) -> dict[str, Any]:
    """A sentence, and the crosstalk that it rests on; SpectralAdapterError as the loaders raise it."""
    if not 2 <= len(files) <= MOST:
        raise SpectralAdapterError(f"{len(files)} adapters: expected two to {MOST}")
    with torch.inference_mode(False), torch.no_grad():
        opened = [adapters.open_adapter(name) for name in files]
        found = examine([each.adapter for each in opened])
    labels = [PurePosixPath(name).stem for name in files]
    cells = [[None if v is None else round(v, 3) for v in row] for row in found.affinity.total]
    return {"concepts": labels, "bleed": cells, "verdict": sentence(found, labels)}


def sentence(found: Interference, labels: list[str]) -> str:
    """In plain words, for the worst of them."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j]
    layers = [
        name
        for name, rows in found.affinity.layers.items()
        if any((rows[i][j] or 0.0) >= BLEED for i, j in pairs)
    ]
    if not found.overlaps:
        return "No layer is changed by two of them: they cannot get into each other's way. Use sum."
    if not found.warnings:
        where = f"; {len(layers)} layers alone would" if layers else ""
        return f"These will hardly bleed into each other{where}. sum is enough."
    kept = "these two" if len(labels) == 2 else "some of these"
    shared = len(found.affinity.layers)
    return f"{kept} will bleed in {len(layers)} of {shared} layers: use closed-form, or distil.".capitalize()
