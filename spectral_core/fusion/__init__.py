"""Fusion: several adapters in, one adapter and a report out; the inputs are never changed.

``sum`` Σ sᵢΔWᵢ is what stacking gives, ``average`` divides it by the number of concepts, ``spectral`` adds
the changes of singular columns (arXiv 2405.13952). Ordinary LoRA files join as plain LoRA adapters. A
method is one function from a layer's sources to its fused terms; :data:`FUSIONS` lists them.

Shapes: those of the adapters' layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..adapter import Adapter, AdapterLayer
from ..errors import SpectralAdapterError
from .columns import ColumnUse, column_allocation, column_uses, overlap_warnings
from .compress import check_budget, compress_layer, freeze
from .lineage import lineage_warnings, merged_provenance, merged_tokens, rename_token
from .linear import Combined, average_layer, sum_layer
from .report import ConceptReport, FusionReport, LayerReport, total_error
from .sources import Concept, LayerSources, concepts_of, layers_of
from .spectral import spectral_layer

__all__ = [
    "FUSIONS",
    "ColumnUse",
    "ConceptReport",
    "Fused",
    "FusionReport",
    "LayerReport",
    "column_allocation",
    "freeze",
    "fuse",
    "recompress",
    "rename_token",
]

FUSIONS: dict[str, Callable[[LayerSources], Combined]] = {
    "sum": sum_layer,
    "average": average_layer,
    "spectral": spectral_layer,
}


@dataclass(frozen=True)
class Fused:
    """The fused adapter (strength 1, its parents in its provenance) and what happened."""

    adapter: Adapter
    report: FusionReport


def fuse(
    adapters: Sequence[Adapter],
    method: str = "sum",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    error: float | None = None,
    freeze_gates: bool = False,
    name: str = "",
) -> Fused:
    """One adapter that does what all of them do.

    weights: a strength for each, any sign, on top of the adapters' own; 0 drops the concept with its words
    and tokens. rank, error: re-compress every layer to this rank, or to the smallest rank within this
    relative error; with both, to the error but never above the rank. freeze_gates: replace adaptive gates
    by their masks from training, so that they can be compressed and exported; otherwise they stay live.
    name: of the result.

    Raises:
        SpectralAdapterError: for layers of different shapes, different schedules, one token with two
        meanings, and settings out of range.
    """
    if method not in FUSIONS:
        raise SpectralAdapterError(f"unknown fusion {method!r}: expected one of {', '.join(FUSIONS)}")
    check_budget(rank, error)
    concepts, schedule = concepts_of(adapters, weights)
    inputs = [replace(c, adapter=freeze(c.adapter)) for c in concepts] if freeze_gates else concepts
    layers: dict[str, AdapterLayer] = {}
    rows: list[LayerReport] = []
    for layer in layers_of(inputs):
        layers[layer.name], row = _fuse_layer(layer, method, rank, error)
        rows.append(row)
    if not layers:
        raise SpectralAdapterError(
            "no layer is left to fuse: every layer's strength is 0, or the adapters are empty"
        )
    settings = {"method": method, "rank": rank, "error": error, "freeze_gates": freeze_gates}
    provenance = merged_provenance(concepts, name, settings)
    fused = Adapter(layers, provenance, schedule=schedule, tokens=merged_tokens(concepts))
    return Fused(fused, _report(method, concepts, rows, fused.mergeable))


def _fuse_layer(
    layer: LayerSources, method: str, rank: int | None, error: float | None
) -> tuple[AdapterLayer, LayerReport]:
    combined = FUSIONS[method](layer)
    small = compress_layer(combined.terms, layer.shape, rank, error)
    row = LayerReport(
        name=layer.name,
        form=combined.form,
        concepts=tuple(dict.fromkeys(source.concept for source in layer.sources)),
        rank_before=small.rank_before,
        rank_after=small.rank_after,
        norm=small.norm,
        error=small.error,
        cross_terms=combined.cross_terms,
        note="; ".join(dict.fromkeys(note for note in (combined.note, small.note) if note)),
    )
    return AdapterLayer(layer.shape, small.terms), row


def _report(
    method: str, concepts: Sequence[Concept], rows: Sequence[LayerReport], mergeable: bool
) -> FusionReport:
    labels, adapters = [c.label for c in concepts], [c.adapter for c in concepts]
    return FusionReport(
        method=method,
        concepts=tuple(
            ConceptReport(c.label, c.weight, c.adapter.strength, c.adapter.methods, len(c.adapter.layers))
            for c in concepts
        ),
        layers=tuple(rows),
        error=total_error(rows),
        mergeable=mergeable,
        columns=column_uses(labels, adapters),
        warnings=(*lineage_warnings(concepts), *overlap_warnings(labels, adapters)),
    )


def recompress(adapter: Adapter, rank: int | None = None, error: float | None = None) -> Fused:
    """One adapter at a smaller rank (or within a relative error), its strengths folded in."""
    if rank is None and error is None:
        raise SpectralAdapterError("nothing to compress to: give a rank, an error, or both")
    return fuse([adapter], rank=rank, error=error, name=adapter.provenance.name)
