"""An adapter on a base that may not be the one it was trained on: told by the original weights.

``delta`` applies the stored change as it is. ``rebase`` finds the singular columns that a Spectral adapter
turns or extends in this model's own weights, so that its change is one of them. ``strict`` refuses another
base. Which base it is follows from the fingerprint in the file, or from how far the stored columns are from
being singular columns here.

Shapes: W (out, in, *kernel); u (out, r), s (r,), v (fan_in, r).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....spectral_core.adapter import fingerprint
from ....spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.maths.layers import as_fp32
from ....spectral_core.maths.realign import project_basis, realign
from ....spectral_core.maths.svd import Columns
from ..model import base_weights
from . import gate_records as records

UNRELATED = (
    0.7  # of a residual that is √2 where two bases have nothing in common, and 0.1 to 0.4 for fine-tunes
)
_SEED = 1
_KEPT = 4  # adapters per base model

# For the whole process on purpose: a new strength executes the node again, and must not compute an SVD.
_REBASED: WeakKeyDictionary[Any, dict[str, tuple[Adapter, list[str]]]] = WeakKeyDictionary()


def for_base(
    adapter: Adapter, model: Any | None, clip: Any | None, base_mismatch: str
) -> tuple[Adapter, list[str]]:
    """The adapter for this model, and lines for the report.

    Raises SpectralAdapterError for another base with ``strict``, for an unrelated one with ``rebase``.
    """
    if base_mismatch == "strict":
        return adapter, _strict(adapter, model, clip)
    if base_mismatch == "rebase" and any(_has_basis(layer) for layer in adapter.layers.values()):
        return _rebase(adapter, model, clip)
    return adapter, []


def _has_basis(layer: AdapterLayer) -> bool:
    return any("u" in term.params for term in layer.terms)


def _strict(adapter: Adapter, model: Any | None, clip: Any | None) -> list[str]:
    weights = base_weights.available(adapter, model, clip)
    if adapter.provenance.base.get("layers"):
        match = fingerprint.compare(adapter.provenance.base, weights)
        distance, verdict, where = match.distance, match.verdict, match.worst_layer
    else:
        distances = {
            name: _distance(term, weights[name])
            for name, layer in adapter.layers.items()
            for term in layer.terms
            if name in weights and "u" in term.params
        }
        if not distances:
            return ["base mismatch strict: the file says nothing about its base; not checked"]
        where = max(distances, key=lambda name: distances[name])
        distance = distances[where]
        verdict = fingerprint.verdict_of(distance)
    if verdict == "different":
        raise SpectralAdapterError(
            f"adapter {adapter.provenance.name or '(unnamed)'}: this model is not the base it was trained "
            f"on: their weights are {distance:.2g} apart (allowed {fingerprint.CLOSE:g}), most in {where}. "
            "Load that base, or choose base mismatch delta or rebase"
        )
    return [f"base mismatch strict: {verdict} base, distance {distance:.2g}"]


def _rebase(adapter: Adapter, model: Any | None, clip: Any | None) -> tuple[Adapter, list[str]]:
    owners = [owner for owner in (base_weights.owner(model), base_weights.owner(clip)) if owner is not None]
    key = records.key_of(adapter) + str([id(owner) for owner in owners])
    kept = _REBASED.setdefault(owners[0], {}) if owners else {}
    if key not in kept:
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = _rebased(adapter, base_weights.available(adapter, model, clip))
    found, notes = kept[key]
    return replace(adapter, layers=found.layers), notes


def _rebased(adapter: Adapter, weights: dict[str, Tensor]) -> tuple[Adapter, list[str]]:
    layers, moved, farthest = dict(adapter.layers), 0, 0.0
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in adapter.layers.items():
            if name not in weights or not _has_basis(layer):
                continue
            terms = []
            for term in layer.terms:
                new, residual = _rebased_term(name, term, weights[name])
                moved += new is not term
                farthest = max(farthest, residual)
                terms.append(new)
            layers[name] = replace(layer, terms=tuple(terms))
    text = f"base mismatch rebase: {moved} singular bases taken from this model, at most {farthest:.2g} away"
    return replace(adapter, layers=layers), [text]


def _basis(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = (as_fp32(term.params[key]).detach().cpu() for key in ("u", "s", "v"))
    return u, s, v


def _distance(term: Term, weight: Tensor) -> float:
    """How far the stored columns are from singular columns of W: ‖W·V − U·S‖ and ‖Wᵀ·U − V·S‖, over ‖S‖."""
    u, s, v = _basis(term)
    flat = weight.flatten(1)
    miss = torch.maximum((flat @ v - u * s).norm(), (flat.mT @ u - v * s).norm())
    return float(miss / s.norm().clamp_min(torch.finfo(s.dtype).tiny))


def _rebased_term(name: str, term: Term, weight: Tensor) -> tuple[Term, float]:
    """The term with this weight's own columns, turned so that they lie nearest to the stored ones."""
    if "u" not in term.params:
        return term, 0.0
    u, s, v = _basis(term)
    flat, distance = weight.flatten(1), _distance(term, weight)
    if distance <= fingerprint.SAME:
        return term, distance
    columns = Columns.listed(term.config.columns)  # type: ignore[union-attr]
    found = realign(weight, s, *project_basis(u, v, _SEED), _SEED, columns)
    if found.residual > UNRELATED:
        raise SpectralAdapterError(
            f"layer {name}: base mismatch rebase: this model's singular columns are {found.residual:.2g} "
            f"from those the adapter was trained on (related models are within {UNRELATED:g}): it is another "
            "kind of model. Choose base mismatch delta, or load the adapter's base"
        )
    here = ((found.u.mT @ flat) * found.v.mT).sum(1)
    params = {**term.params, "u": found.u.clone(), "s": here.clone(), "v": found.v.clone()}
    return replace(term, params=params), found.residual
