"""Spectral fusion: W' = (U₀ + Σ λᵢ Uᵢ) S₀ (V₀ + Σ λᵢ Vᵢ)ᵀ (Zhang & Pilanci, NeurIPS 2024, arXiv 2405.13952).

Uᵢ, Vᵢ are what concept i adds to its columns. Over the union K of all concepts' columns this is one
Spectral A layer: A_U = Σ λᵢ Uᵢ and A_V = Σ λᵢ Vᵢ padded to K, so ΔW has the exact delta form of rank ≤
2·|K| and nothing cancels. A rotation joins as Uᵢ = U₁(R_U − I), Vᵢ = V₁(R_V − I); trained singular values
as S₀ + Σ λᵢ Cᵢ. λᵢ is the weight times the strengths; it acts on both factors, so ΔW has terms in λ². With
disjoint columns and λ = 1 this is Σ ΔWᵢ.

All concepts must have the columns of one and the same SVD; that is checked on what the adapters store.

Shapes: u, a_u (out, |K|); s, a_s (|K|,); v, a_v (fan_in, |K|).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Term
from ..maths.cayley import cayley_minus_identity
from ..maths.layers import as_fp32
from ..maths.lowrank import concatenate, norm
from ..maths.precision import full_precision
from ..methods import SpectralAConfig, SpectralRConfig
from .linear import Combined, is_rotation, sum_layer
from .options import FusionOptions
from .sources import LayerSources, Source

BASIS_TOLERANCE = 5e-3
"""Largest deviation of a shared column, of a |cosine| between different ones and of a singular value
(relative).

Columns of one weight reach 2e-4 when stored in half precision; those of another fine-tune differ by 0.1 and
more.
"""


@dataclass(frozen=True)
class Additive:
    """A spectral term written as changes of its columns: ΔW = (U+A_U)(S+C)(V+A_V)ᵀ − U S Vᵀ."""

    concept: str
    columns: tuple[int, ...]
    u: Tensor
    s: Tensor
    v: Tensor
    a_u: Tensor
    a_v: Tensor
    c: Tensor | None


def additive_form(source: Source) -> Additive | None:
    """The term's changes at weight λ, already multiplied by it; None for a method without columns."""
    config, weight = source.term.config, source.weight
    if not isinstance(config, SpectralAConfig | SpectralRConfig):
        return None
    params = {name: as_fp32(tensor.detach()) for name, tensor in source.term.params.items()}
    u, s, v = params["u"], params["s"], params["v"]
    c = None
    if isinstance(config, SpectralAConfig):
        a_u, a_v = params["a_u"] * weight, params["a_v"] * weight
        if config.train_scale:
            c = params["a_s"] * weight
    else:
        # a rotation law puts the weight into the angle, the others scale the change
        angle, scale = (weight, 1.0) if is_rotation(source.term) else (1.0, weight)
        k_u, k_v = (cayley_minus_identity(params[q] * angle, config.rank) for q in ("q_u", "q_v"))
        with full_precision(u.device):
            a_u, a_v = u @ k_u * scale, v @ k_v * scale
        if config.train_scale:
            c = s * params["s_scale"] * weight
    return Additive(source.concept, config.columns, u, s, v, a_u, a_v, c)


def spectral_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """The paper's form where every term has columns of one SVD; ``sum`` with the reason in its note where
    not.
    """
    forms: list[Additive] = []
    for source in layer.sources:
        form = additive_form(source)
        if form is None:
            return _fallback(
                layer, options, f"{source.concept} is {source.term.config.method}, which has no columns"
            )
        forms.append(form)
    basis, reason = shared_basis(forms)
    if reason:
        return _fallback(layer, options, reason)
    term = _joined(basis, forms)
    notes = ["rotations folded at their strength"] if any(is_rotation(s.term) for s in layer.sources) else []
    return Combined((term,), "spectral", "; ".join(notes), _cross_terms(term, layer))


def _fallback(layer: LayerSources, options: FusionOptions, reason: str) -> Combined:
    return Combined(sum_layer(layer, options).terms, "sum", f"added up instead: {reason}")


def shared_basis(forms: Sequence[Additive]) -> tuple[dict[int, tuple[Tensor, Tensor, Tensor]], str]:
    """column -> (u, s, v), ascending, from the first that holds it; and why it is not one basis, or
    nothing.
    """
    basis: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    holder: dict[int, str] = {}
    for form in forms:
        for place, column in enumerate(form.columns):
            mine = (form.u[:, place], form.s[place], form.v[:, place])
            if column not in basis:
                basis[column], holder[column] = mine, form.concept
                continue
            theirs = basis[column]
            off = max(float(torch.linalg.vector_norm(mine[i] - theirs[i])) for i in (0, 2))
            off = max(off, float((mine[1] - theirs[1]).abs() / theirs[1].abs()))
            if not off <= BASIS_TOLERANCE:
                return {}, (
                    f"column {column} differs between {holder[column]} and {form.concept} (by {off:.1g}, at "
                    f"most {BASIS_TOLERANCE:g}): not the columns of one base weight"
                )
    basis = dict(sorted(basis.items()))
    return basis, _not_of_one_svd(basis)


def _not_of_one_svd(basis: dict[int, tuple[Tensor, Tensor, Tensor]]) -> str:
    """Why these columns cannot come from one SVD: not orthonormal, or singular values not descending; or
    nothing.
    """
    for side, index in (("left", 0), ("right", 2)):
        stacked = torch.stack([columns[index] for columns in basis.values()], 1).double()
        gram = stacked.mT @ stacked
        off = float((gram - torch.eye(len(basis), dtype=gram.dtype, device=gram.device)).abs().max())
        if not off <= BASIS_TOLERANCE:
            return (
                f"the stored {side} columns are not orthonormal (|cos| up to {off:.2g}, at most "
                f"{BASIS_TOLERANCE:g}): they come from different base weights"
            )
    values = torch.stack([s for _, s, _ in basis.values()])
    if bool((values[1:] > values[:-1] * (1 + BASIS_TOLERANCE)).any()):
        return (
            "the stored singular values do not descend with their columns: they come from different base "
            "weights"
        )
    return ""


def _joined(basis: dict[int, tuple[Tensor, Tensor, Tensor]], forms: Sequence[Additive]) -> Term:
    """One Spectral A term over the union of columns."""
    place = {column: i for i, column in enumerate(basis)}
    u = torch.stack([columns[0] for columns in basis.values()], 1)
    s = torch.stack([columns[1] for columns in basis.values()])
    v = torch.stack([columns[2] for columns in basis.values()], 1)
    a_u, a_v, a_s = torch.zeros_like(u), torch.zeros_like(v), torch.zeros_like(s)
    for form in forms:
        at = torch.tensor([place[c] for c in form.columns], device=u.device)
        a_u.index_add_(1, at, form.a_u.to(u.dtype))
        a_v.index_add_(1, at, form.a_v.to(u.dtype))
        if form.c is not None:
            a_s.index_add_(0, at, form.c.to(u.dtype))
    trained = any(form.c is not None for form in forms)
    params = {"u": u, "s": s, "v": v, "a_u": a_u, "a_v": a_v} | ({"a_s": a_s} if trained else {})
    return Term(SpectralAConfig(tuple(basis), train_scale=trained), params)


def _cross_terms(term: Term, layer: LayerSources) -> float:
    """‖ΔW_spectral − Σ sᵢ ΔWᵢ‖ / ‖Σ sᵢ ΔWᵢ‖: what the form adds beyond the sum."""
    summed = concatenate([source.kept().factors(layer.shape) for source in layer.sources])
    size = norm(summed)
    difference = norm(concatenate([term.factors(layer.shape), summed.scaled(-1.0)]))
    return difference / size if size else 0.0
