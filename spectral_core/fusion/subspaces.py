"""Fusion without data: the closed form for inputs that the adapters themselves suggest.

Concept i's inputs are taken to lie evenly in the rows of its own update, and anywhere else alike:

    ΔW = Σ sᵢΔWᵢ (Pᵢ/rᵢ + (λ/K)I) (Σ Pⱼ/rⱼ + λI)⁻¹,  Pᵢ the projector on ΔWᵢ's rᵢ rows,  λ = ρ·tr(ΣP/r)/dim

The idea is WUDI-Merging's (Cheng et al., arXiv 2503.08099), which descends Σ‖(ΔW − ΔWᵢ)ΔWᵢᵀ‖²/‖ΔWᵢ‖²; here it
is solved, its C_i = ΔWᵢᵀΔWᵢ is flattened to the projector, and a ridge towards the average stands for inputs
that all concepts share. Where rows are orthogonal the sum comes back for ρ → 0, where they coincide the
average.

Shapes: as in :mod:`.closed_form`, in the basis of all concepts' rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..statistics.moments import Statistics, row_basis, wide
from .closed_form import low_rank, problem_of
from .linear import Combined, average_layer
from .options import FusionOptions
from .sources import LayerSources

_NEGLIGIBLE = 1e-6  # of the largest singular value of a concept's rows


def subspaces_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """The solution; where an adaptive gate is live, whose update is not fixed, the average."""
    if any(not source.term.mergeable for source in layer.sources):
        note = "adaptive gates stay live and are averaged: freeze them to include them"
        return replace(average_layer(layer, options), note=note)
    downs: dict[int, list[Tensor]] = {s.adapter: [] for s in layer.sources}
    for source in layer.sources:
        downs[source.adapter].append(wide(source.term.factors(layer.shape).down.flatten(1)))
    basis = row_basis([down for found in downs.values() for down in found])
    assumed = {
        place: Statistics(_projector(torch.cat(found) @ basis.mT), layer.shape.fan_in, basis)
        for place, found in downs.items()
    }
    problem = problem_of(replace(layer, inputs=assumed), options)
    lam = options.subspace_ridge * problem.mean_moment()
    return Combined((low_rank(problem.up, problem.rows(lam, to_prior=True), layer),), "subspaces")


def _projector(rows: Tensor) -> Tensor:
    """P/r (d, d) of the span of ``rows`` (R, d), r its dimension; 0 for no rows."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    kept = vh[s > _NEGLIGIBLE * s[:1]]
    made: Tensor = kept.mT @ kept / max(len(kept), 1)
    return made
