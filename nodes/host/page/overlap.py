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
    """How many layers will bleed, and the crosstalk that it rests on; SpectralAdapterError as the loaders
    raise it. The page says it in words (``web/js/lib/verdict.mjs``).

    bleeding, shared: layers in which one is loud on another's inputs, and that two of them change.
    """
    if not 2 <= len(files) <= MOST:
        raise SpectralAdapterError(f"{len(files)} adapters: expected two to {MOST}")
    with torch.inference_mode(False), torch.no_grad():
        opened = [adapters.open_adapter(name) for name in files]
        found = examine([each.adapter for each in opened])
    return {
        "concepts": [PurePosixPath(name).stem for name in files],
        "bleed": found.table,
        "bleeding": _bleeding(found, len(files)),
        "shared": len(found.affinity.layers) if found.overlaps else 0,
        "warns": bool(found.warnings),
    }


def _bleeding(found: Interference, count: int) -> int:
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    layers = found.affinity.layers.values()
    return sum(any((rows[i][j] or 0.0) >= BLEED for i, j in pairs) for rows in layers)
