"""Spectral A updates without their share in other concepts' columns.

Disjoint columns alone do not make ⟨ΔWᵢ, ΔWⱼ⟩ = 0: what Aᵢ adds to its columns may lie along the columns of
j, and A_iS_iV_iᵀ against U_jS_jB_jᵀ survives. Projecting A_U off the other concepts' u and A_V off their v
removes these mixed terms, and leaves only ⟨A_iS_iB_iᵀ, A_jS_jB_jᵀ⟩, of second order in the updates.

Shapes: a_u (out, r), a_v (fan_in, r); the others' columns (out, k), (fan_in, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Term
from ..methods import SpectralAConfig
from ..statistics.moments import wide


def separated(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with A_U and A_V orthogonal to the columns that only others use in the same layer."""
    return [_off_the_others(adapter, [a for a in adapters if a is not adapter]) for adapter in adapters]


def _off_the_others(adapter: Adapter, others: Sequence[Adapter]) -> Adapter:
    def change(name: str, term: Term) -> Term:
        if not isinstance(term.config, SpectralAConfig):
            return term
        sides = [_columns(others, name, key, term.config.columns) for key in ("u", "v")]
        params = dict(term.params)
        for key, basis in zip(("a_u", "a_v"), sides, strict=True):
            if basis is not None:
                params[key] = _project_off(params[key], basis)
        return replace(term, params=params)

    return adapter.map_terms(change)


def _columns(others: Sequence[Adapter], name: str, key: str, own: Sequence[int]) -> Tensor | None:
    """An orthonormal basis of the columns that others use and ``own`` does not."""
    found: dict[int, Tensor] = {}
    for other in others:
        for term in other.layers[name].terms if name in other.layers else ():
            for place, column in enumerate(term.config.singular_columns):
                if column not in own:
                    found[column] = term.params[key][:, place]
    if not found:
        return None
    made: Tensor = torch.linalg.qr(wide(torch.stack(list(found.values()), 1)))[0]
    return made


def _project_off(a: Tensor, basis: Tensor) -> Tensor:
    given = wide(a)
    return (given - basis @ (basis.mT @ given)).to(a)
