"""Fusion: several adapters in, one adapter and a report out; the inputs are never changed.

``sum`` Σ sᵢΔWᵢ is what stacking gives, ``average`` divides it by the number of concepts, ``spectral`` adds
the changes of singular columns (arXiv 2405.13952), ``orthogonal`` adds adapters trained in orthogonal rows,
``subspaces`` lets each act in the directions that only it reads and averages the rest. ``closed-form`` and
``closed-form-rank`` keep what each concept does to its own inputs, for which they need statistics of these
(:mod:`..statistics.collect`), and ``gradient`` descends the same objective. Ordinary LoRA files join as plain
LoRA adapters. A method is one function from a layer's sources to its fused terms; :data:`FUSIONS` lists them.
Layers are fused one after the other, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..adapter.adapter import Adapter, AdapterLayer
from ..errors import SpectralAdapterError
from ..statistics.moments import Statistics
from ..words import OneLine, chosen
from .activations import kept_by_concept, total_retention, with_inputs
from .closed_form import closed_form_layer, closed_form_rank_layer
from .columns import ColumnUse, column_uses, overlap_warnings
from .compress import check_budget, compress_layer, freeze
from .gradient import gradient_layer
from .lineage import lineage_warnings, merged_provenance, merged_tokens, rename_token
from .linear import Combined, average_layer, sum_layer
from .options import FusionOptions
from .orthogonal import orthogonal_layer
from .report import ConceptReport, FusionReport, LayerReport, total_error
from .separate import separated
from .sources import Concept, LayerSources, concepts_of, layers_of
from .spectral import spectral_layer
from .subspaces import subspaces_layer

__all__ = [
    "FUSIONS",
    "FUSION_METHODS",
    "ColumnUse",
    "ConceptReport",
    "Fused",
    "Fusion",
    "FusionMethod",
    "FusionOptions",
    "FusionReport",
    "LayerReport",
    "freeze",
    "fuse",
    "recompress",
    "rename_token",
    "separated",
]


@dataclass(frozen=True)
class Fusion:
    """A fusion method; ``needs_statistics`` of the layers' inputs under every concept."""

    combine: Callable[[LayerSources, FusionOptions], Combined]
    needs_statistics: bool = False


FusionMethod = Literal[
    "sum", "average", "spectral", "orthogonal", "subspaces", "closed-form", "closed-form-rank", "gradient"
]
FUSION_METHODS: tuple[FusionMethod, ...] = get_args(FusionMethod)
FUSIONS: Mapping[FusionMethod, Fusion] = {
    "sum": Fusion(sum_layer),
    "average": Fusion(average_layer),
    "spectral": Fusion(spectral_layer),
    "orthogonal": Fusion(orthogonal_layer),
    "subspaces": Fusion(subspaces_layer),
    "closed-form": Fusion(closed_form_layer, needs_statistics=True),
    "closed-form-rank": Fusion(closed_form_rank_layer, needs_statistics=True),
    "gradient": Fusion(gradient_layer, needs_statistics=True),
}


@dataclass(frozen=True, repr=False)
class Fused(OneLine):
    """The fused adapter (strength 1, its parents in its provenance) and what happened."""

    adapter: Adapter
    report: FusionReport

    def __str__(self) -> str:
        return self.report.text


def fuse(
    adapters: Sequence[Adapter],
    method: FusionMethod = "sum",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    error: float | None = None,
    freeze_gates: bool = False,
    name: str = "",
    *,
    statistics: Sequence[Mapping[str, Statistics]] | None = None,
    base_statistics: Mapping[str, Statistics] | None = None,
    options: FusionOptions | None = None,
) -> Fused:
    """One adapter that does what all of them do.

    weights: a strength for each, any sign, on top of the adapters' own; 0 drops the concept with its words
    and tokens. rank, error: re-compress every layer to this rank, or to the smallest rank within this
    relative error; with both, to the error but never above the rank. freeze_gates: replace adaptive gates
    by their masks from training, so that they can be compressed and exported; otherwise they stay live, but
    for the methods with statistics, which replace them by what they did. name: of the result.

    statistics: for each adapter, layer name -> statistics of the layer's inputs under its concept; read once
    per layer. With them the report has every concept's retention, and compression loses as little as possible
    of what the concepts do to their inputs instead of the weights. base_statistics: the same under prompts
    without any concept, where ``closed-form`` and ``gradient`` then change little.

    Raises:
        SpectralAdapterError: for layers of different shapes, different schedules, one token with two
        meanings, missing statistics, and settings out of range.

    >>> import torch, spectral_core as sc
    >>> adapter = sc.create({"unet.to_q": torch.randn(8, 6)}, sc.LoRAConfig(rank=2))
    >>> fused = sc.fuse([adapter, adapter.scaled(0.5)], weights=[1.0, 2.0], name="both")
    >>> fused.adapter
    Adapter('both': 1 layers, lora ×2)
    """
    method = chosen(method, FUSION_METHODS, "unknown fusion")
    check_budget(rank, error)
    options = options or FusionOptions()
    concepts, schedule = concepts_of(adapters, weights)
    _check_statistics(method, len(adapters), statistics)
    inputs = _prepared(concepts, freeze_gates, options)
    layers: dict[str, AdapterLayer] = {}
    rows: list[LayerReport] = []
    for bare in layers_of(inputs):
        layer = with_inputs(bare, concepts, statistics, base_statistics)
        layers[layer.name], row = _fuse_layer(layer, method, rank, error, options)
        rows.append(row)
    if not layers:
        raise SpectralAdapterError(
            "no layer is left to fuse: every layer's strength is 0, or the adapters are empty"
        )
    settings = {"method": method, "rank": rank, "error": error, "freeze_gates": freeze_gates}
    provenance = merged_provenance(concepts, name, settings)
    fused = Adapter(layers, provenance, schedule=schedule, tokens=merged_tokens(concepts))
    return Fused(fused, _report(method, concepts, rows, fused.mergeable))


def _check_statistics(method: FusionMethod, count: int, statistics: Sequence[object] | None) -> None:
    if statistics is None and FUSIONS[method].needs_statistics:
        free = ", ".join(name for name, fusion in FUSIONS.items() if not fusion.needs_statistics)
        raise SpectralAdapterError(
            f"fusion {method!r} needs statistics of the layers' inputs under every concept: collect them "
            f"(spectral_core.statistics.collect) and give statistics=[…], or choose one of {free}"
        )
    if statistics is not None and len(statistics) != count:
        raise SpectralAdapterError(
            f"statistics of {len(statistics)} concepts for {count} adapters: expected one mapping for each"
        )


def _prepared(concepts: Sequence[Concept], freeze_gates: bool, options: FusionOptions) -> list[Concept]:
    """The concepts with their gates frozen and their columns separated, where that is asked for."""
    adapters = [freeze(c.adapter) if freeze_gates else c.adapter for c in concepts]
    if options.separate_columns:
        adapters = separated(adapters)
    return [replace(c, adapter=a) for c, a in zip(concepts, adapters, strict=True)]


def _fuse_layer(
    layer: LayerSources, method: FusionMethod, rank: int | None, error: float | None, options: FusionOptions
) -> tuple[AdapterLayer, LayerReport]:
    fusion = FUSIONS[method]
    if fusion.needs_statistics and not layer.inputs:
        combined = average_layer(layer, options)
        combined = replace(combined, note="averaged instead: no statistics of all concepts here")
    else:
        combined = fusion.combine(layer, options)
    small = compress_layer(combined.terms, layer.shape, rank, error, layer.inputs)
    concepts = tuple(dict.fromkeys(source.concept for source in layer.sources))
    row = LayerReport(
        name=layer.name,
        form=combined.form,
        concepts=concepts,
        rank_before=small.rank_before,
        rank_after=small.rank_after,
        norm=small.norm,
        error=small.error,
        cross_terms=combined.cross_terms,
        kept=kept_by_concept(layer, small.terms),
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
            ConceptReport(
                c.label,
                c.weight,
                c.adapter.strength,
                c.adapter.methods,
                len(c.adapter.layers),
                total_retention(c.label, rows),
            )
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
    small = fuse(
        [adapter], rank=rank, error=error, freeze_gates=not adapter.mergeable, name=adapter.provenance.name
    )
    training = {**adapter.provenance.training, **small.adapter.provenance.training}
    return replace(small, adapter=small.adapter.with_provenance(training=training))
