"""Orthogonal fusion: Σ sᵢΔWᵢ of adapters whose rows were drawn orthogonal (Po et al., arXiv 2312.02432).

Adapters trained as :mod:`..methods.orthogonal` in different blocks read disjoint, orthogonal directions of
every layer's input: AᵢAⱼᵀ = 0, so that ⟨ΔWᵢ, ΔWⱼ⟩ = 0 and none changes what another does to its directions.
Others are added up all the same, and the layer says that they are not orthogonal.

Shapes: rows (r, fan_in).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ..statistics.moments import wide
from .linear import Combined, sum_layer
from .options import FusionOptions
from .sources import LayerSources

TOLERANCE = 1e-3
"""Largest cosine between two concepts' row spaces that counts as orthogonal; half precision reaches 5e-4."""


def orthogonal_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """The sum, after a look at the largest cosine between the concepts' row spaces."""
    terms = sum_layer(layer, options).terms
    bases: dict[str, Tensor] = {}
    for concept in dict.fromkeys(source.concept for source in layer.sources):
        rows = [s.term.factors(layer.shape).down.flatten(1) for s in layer.sources if s.concept == concept]
        bases[concept] = torch.linalg.qr(wide(torch.cat(rows)).mT)[0]
    worst, pair = 0.0, ("", "")
    for (name_a, a), (name_b, b) in combinations(bases.items(), 2):
        cosine = float(torch.linalg.matrix_norm(a.mT @ b, ord=2))
        if cosine > worst:
            worst, pair = cosine, (name_a, name_b)
    if worst > TOLERANCE:
        return Combined(terms, "sum", f"not orthogonal: the rows of {pair[0]} and {pair[1]} share directions")
    return Combined(terms, "orthogonal")
