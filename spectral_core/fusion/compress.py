"""After the fusion: adaptive gates frozen, and layers re-compressed to a rank or an error.

Compression is the best low-rank approximation of a layer's whole update (Eckart–Young) by QR and a small
SVD of its factors. An adaptive gate has no fixed update: its term stays beside the compressed rest, unless
it is frozen first.

Shapes: those of the terms; the compressed term is a LoRA, down (rank, in, *kernel), up (out, rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Term
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors, concatenate, kept_rank, norm, recompress
from ..methods import method_of
from ..statistics.moments import Statistics, wide
from .activations import metric_of
from .linear import is_rotation, plain_term


@dataclass(frozen=True)
class Compressed:
    """A layer after compression: ranks of everything, error and size of the part that could be compressed."""

    terms: tuple[Term, ...]
    rank_before: int
    rank_after: int
    norm: float | None = None
    error: float = 0.0
    note: str = ""


def freeze(adapter: Adapter) -> Adapter:
    """Every adaptive gate replaced by its mask from training, E[p] > ½; the result merges and exports
    exactly.
    """

    def frozen(name: str, term: Term) -> Term:
        if term.mergeable:
            return term
        config, params = method_of(term.config).freeze(term.config, term.params)
        return replace(term, config=config, params=params)

    return adapter.map_terms(frozen)


def check_budget(rank: object, error: object) -> None:
    """Refuse a rank that is not a positive whole number and an error outside 0…1."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SpectralAdapterError(f"rank {rank!r} to compress to: expected a whole number of at least 1")
    if error is not None and (
        isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1
    ):
        raise SpectralAdapterError(
            f"error {error!r} to compress to: expected a relative error between 0 and 1, such as 0.05"
        )


def compress_layer(
    terms: Sequence[Term],
    shape: LayerShape,
    rank: int | None,
    error: float | None,
    inputs: Mapping[int, Statistics] | None = None,
) -> Compressed:
    """The layer at ``rank`` at most, or at the smallest rank within the relative ``error``; see
    :func:`recompress`. With statistics of its inputs, size and error are those of its output on them.

    A layer that is within the rank already stays as it is, exactly.
    """
    ranks = [term.factors(shape).rank for term in terms]
    before = sum(ranks)
    fixed = [term for term in terms if term.mergeable]
    live = [term for term in terms if not term.mergeable]
    note = f"{len(live)} adaptive gate(s) kept live and not compressed: freeze to include" if live else ""
    rank_fixed = sum(r for r, term in zip(ranks, terms, strict=True) if term.mergeable)
    if (rank is None and error is None) or not rank_fixed:
        return Compressed(tuple(terms), before, before)
    factors = concatenate([term.factors(shape) for term in fixed])
    size = norm(factors) if not inputs else float(torch.linalg.matrix_norm(_output_core(factors, inputs)[1]))
    if error is None and rank is not None and rank_fixed <= rank:
        return Compressed(tuple(terms), before, before, size, 0.0, note)
    if inputs:
        smaller, lost = recompress_on(factors, inputs, rank, error)
    else:
        smaller, lost = recompress(factors, rank, error)
    if smaller.rank >= rank_fixed:
        return Compressed(tuple(terms), before, before, size, 0.0, note)
    if any(is_rotation(term) for term in fixed):
        note = "; ".join(filter(None, [note, "rotations folded at their strength"]))
    after = before - rank_fixed + smaller.rank
    return Compressed((plain_term(smaller), *live), before, after, size, lost, note)


def recompress_on(
    factors: Factors, inputs: Mapping[int, Statistics], rank: int | None, error: float | None
) -> tuple[Factors, float]:
    """min ‖(ΔW − ΔW_r)(ΣC)^½‖ over ΔW_r of a rank, and its relative value: U_kU_kᵀΔW, U_k of ΔW(ΣC)^½."""
    q, core = _output_core(factors, inputs)
    u, s, _ = torch.linalg.svd(core, full_matrices=False)
    kept, lost = kept_rank(s, rank, error)
    turn = q @ u[:, :kept]
    down = turn.mT @ wide(factors.scaled_up()) @ wide(factors.down.flatten(1))
    balance = torch.linalg.vector_norm(down, dim=1).sqrt().clamp(min=1e-30)
    down = (down / balance[:, None]).reshape(kept, *factors.down.shape[1:])
    return Factors(down.to(factors.down), (turn * balance).to(factors.up)), lost


def _output_core(factors: Factors, inputs: Mapping[int, Statistics]) -> tuple[Tensor, Tensor]:
    """Q (out, R) and R·down·L (R, d) with up = QR, L Lᵀ = ΣC: ‖core‖ is the size of the outputs."""
    q, r = torch.linalg.qr(wide(factors.scaled_up()))
    return q, r @ metric_of(inputs, factors.down.flatten(1))
