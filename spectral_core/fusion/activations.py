"""A layer's statistics beside its sources, and how much of each concept the fused layer keeps on them.

    retention  1 − ‖(ΔW − sᵢΔWᵢ) Xᵢ‖ / ‖sᵢΔWᵢ Xᵢ‖   (:mod:`..analysis.interference`)

Shapes: see :mod:`..statistics.moments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.adapter import Term
from ..errors import SpectralAdapterError
from ..statistics.moments import Placed, Statistics, joined, response_of, same_tensors, wide
from .sources import Concept, LayerSources

_WIDENED = 2**25  # numbers of one layer's moments that may be kept in float64: 256 MiB


@dataclass(frozen=True)
class Kept:
    """Mean squares of one concept's output in a layer, on its own inputs: ``had`` alone, ``lost`` fused."""

    concept: str
    had: float
    lost: float

    @property
    def retention(self) -> float | None:
        """None where the concept does nothing."""
        return 1 - (self.lost / self.had) ** 0.5 if self.had else None


def with_inputs(
    layer: LayerSources,
    concepts: Sequence[Concept],
    statistics: Sequence[Mapping[str, Statistics]] | None,
    base: Mapping[str, Statistics] | None,
) -> LayerSources:
    """The layer with the statistics of every concept, on its device; without any where one has none here."""
    if statistics is None or any(layer.name not in statistics[c.place] for c in concepts):
        return layer
    inputs = {c.place: statistics[c.place][layer.name] for c in concepts}
    if base is not None and layer.name in base:
        inputs[-1] = base[layer.name]
    device = wide(next(iter(layer.sources[0].term.params.values()))).device
    moved = {p: replace(s, second_moment=s.second_moment.to(device)) for p, s in inputs.items()}
    if sum(s.second_moment.numel() for s in moved.values()) <= _WIDENED:
        # every formula works in float64, and asks for a moment a dozen times
        moved = {p: replace(s, second_moment=wide(s.second_moment)) for p, s in moved.items()}
    return replace(layer, inputs=_one_space(moved, layer.name))


def _one_space(inputs: Mapping[int, Statistics], name: str) -> Mapping[int, Statistics]:
    """All of a layer's statistics in the same coordinates."""
    bases = [s.basis for s in inputs.values() if s.basis is not None]
    if not bases:
        return inputs
    first = bases[0]
    if any(b.shape != first.shape or not torch.allclose(b, first, atol=1e-5) for b in bases):
        raise SpectralAdapterError(
            f"layer {name}: statistics in different rank spaces: collect all of them with the same adapters "
            "in the same order"
        )
    return {place: s.within(first) if s.basis is None else s for place, s in inputs.items()}


def kept_by_concept(layer: LayerSources, terms: Sequence[Term]) -> tuple[Kept, ...]:
    """What ``terms`` keep of each concept with sources in this layer; nothing without statistics."""
    if not layer.inputs:
        return ()
    fused = [_of_fused(term, layer) for term in terms]
    found = []
    for concept in dict.fromkeys(source.concept for source in layer.sources):
        own = [source.placed() for source in layer.sources if source.concept == concept]
        here = layer.inputs[own[0].adapter]
        alone = joined([response_of(p, layer.shape, here, layer.name) for p in own])
        instead = [response_of(p, layer.shape, here, layer.name).scaled(-1.0) for p in fused]
        found.append(Kept(concept, alone.norm(here) ** 2, joined([alone, *instead]).norm(here) ** 2))
    return tuple(found)


def _of_fused(term: Term, layer: LayerSources) -> Placed:
    """A fused term; a live gate's place is that of the source it was taken from, told by its tensors."""
    if not term.mergeable:
        for source in layer.sources:
            if same_tensors(source.term, term):
                return Placed(term, 1.0, source.adapter, source.index)
    return Placed(term, 1.0, -1, -1)


def total_retention(concept: str, layers: Iterable[object]) -> float | None:
    """Retention over all layers, squares summed first; None without statistics."""
    kept = [k for layer in layers for k in getattr(layer, "kept", ()) if k.concept == concept]
    return Kept(concept, sum(k.had for k in kept), sum(k.lost for k in kept)).retention if kept else None


def total_moment(inputs: Iterable[Statistics]) -> Tensor:
    """ΣC (d, d) in float64, one after the other: many concepts take the memory of one."""
    total: Tensor | None = None
    for statistics in inputs:
        moment = statistics.second_moment
        total = wide(moment).clone() if total is None else total.add_(moment.to(total))
    assert total is not None
    return total


def metric_of(layer_inputs: Mapping[int, Statistics], down: Tensor) -> Tensor:
    """down·L (R, d) with L Lᵀ = ΣC, slightly lifted so that no direction is free of cost."""
    first = next(iter(layer_inputs.values()))
    total = total_moment(layer_inputs.values())
    # of the largest eigenvalue, not the mean one: below that, sums in float32 may have a negative one
    total.diagonal().add_(1e-6 * torch.linalg.matrix_norm(total).clamp(min=torch.finfo(total.dtype).tiny))
    made: Tensor = first.coordinates(down) @ torch.linalg.cholesky(total)
    return made
