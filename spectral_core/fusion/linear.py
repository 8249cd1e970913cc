"""Fusions that add updates: ``sum`` Σ sᵢ ΔWᵢ and ``average`` Σ λᵢ ΔWᵢ with λᵢ = sᵢ/n (FedAvg, arXiv
1602.05629).

Terms are kept as they are with another weight: exact in every precision, adaptive gates stay live (a sum of
gated outputs), spectral terms keep their columns, and a LoRA stays in its own dtype. Compressing is a
separate step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapter.adapter import Term
from ..maths.lowrank import Factors
from ..methods import LoRAConfig
from .options import FusionOptions
from .sources import LayerSources, Source


@dataclass(frozen=True)
class Combined:
    """A fused layer: its terms, the form that made them, and what a user should know about it."""

    terms: tuple[Term, ...]
    form: str
    note: str = ""
    cross_terms: float | None = None


def plain_term(factors: Factors) -> Term:
    """The factors as a LoRA term with alpha = rank; rank ≥ 1."""
    params = {"down": factors.down.detach().contiguous(), "up": factors.scaled_up().detach().contiguous()}
    return Term(LoRAConfig(rank=factors.rank), params)


def is_rotation(term: Term) -> bool:
    """Whether the term's strength turns angles instead of scaling ΔW."""
    return not term.config.is_linear


def sum_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """Σ sᵢ ΔWᵢ, each term under its own law of strength: what stacking the adapters gives."""
    return Combined(tuple(source.kept() for source in layer.sources), "sum")


def average_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """Σ (sᵢ/n) ΔWᵢ over the n concepts of the fusion; a concept without this layer counts as ΔW = 0."""
    terms = tuple(_shared_out(source, layer) for source in layer.sources)
    turned = any(is_rotation(s.term) for s in layer.sources)
    return Combined(terms, "average", "rotations folded at their strength" if turned else "")


def _shared_out(source: Source, layer: LayerSources) -> Term:
    kept = source.kept()
    if is_rotation(source.term):  # 1/n of its update is not its update at 1/n of the angle
        kept = plain_term(kept.factors(layer.shape))
    return replace(kept, weight=kept.weight / layer.concepts)
