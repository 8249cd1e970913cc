"""Low-rank factors: the one form that every method folds to, and everything that is done with it.

ΔW = scale · up · down. Merging, the forward path, export and fusion all start from a :class:`Factors`.

Shapes: down (R, in, *kernel), up (out, R), ΔW (out, in, *kernel); for a linear layer the kernel is empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from .layers import LayerShape, as_fp32
from .precision import full_precision

MOST_NORM = 1e30  # of an update: far above any adapter, and its products stay finite in float32


@dataclass(frozen=True)
class Factors:
    """ΔW = scale · up · down in float32 or float64; R may be 0 (a frozen gate with every row closed)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.down.dtype != self.up.dtype:  # a layer's tensors may be stored in different precisions
            dtype = torch.promote_types(self.down.dtype, self.up.dtype)
            object.__setattr__(self, "down", self.down.to(dtype))
            object.__setattr__(self, "up", self.up.to(dtype))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.up.shape[0], self.down.shape[1], tuple(self.down.shape[2:]))

    def scaled(self, strength: float) -> Factors:
        return replace(self, scale=self.scale * strength)

    def scaled_up(self) -> Tensor:
        """scale · up, so that a forward pass multiplies a small matrix instead of its output."""
        return self.up if self.scale == 1.0 else self.up * self.scale


def delta(factors: Factors) -> Tensor:
    """ΔW (out, in, *kernel) = scale · up · down in the factors' precision."""
    down = factors.down.flatten(1)
    with full_precision(down.device):
        return (factors.scaled_up() @ down).reshape(factors.shape.weight_shape)


def check_usable(factors: Factors, place: str, strength: float = 1.0) -> Factors:
    """The factors, where what is computed with them stays finite: no NaN, and ‖up‖·‖down‖·scale in bounds.

    Raises SpectralAdapterError that begins with ``place``.
    """
    norms = [float(torch.linalg.vector_norm(t.detach().double())) for t in (factors.up, factors.down)]
    size = norms[0] * norms[1] * abs(factors.scale * strength)
    if not size <= MOST_NORM:  # NaN is not
        raise SpectralAdapterError(
            f"{place}: its update is not usable: the factors' norms are {norms[0]:.3g} and {norms[1]:.3g}, "
            f"its strength {factors.scale * strength:.3g}, their product at most {MOST_NORM:g}. The file is "
            "damaged, or its training failed"
        )
    return factors


def concatenate(terms: list[Factors]) -> Factors:
    """Σ scaleᵢ upᵢ downᵢ as one pair of factors, rank Σ Rᵢ, scale 1."""
    if len(terms) == 1:
        return terms[0]
    return Factors(torch.cat([t.down for t in terms], 0), torch.cat([t.scaled_up() for t in terms], 1))


def compact_svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), V (fan_in, k) of ΔW without building it: QR of both factors, SVD of the small core.

    Singular values descend; k = min(R, out, fan_in).
    """
    up, down = as_fp32(factors.scaled_up()), as_fp32(factors.down.flatten(1))
    with full_precision(up.device):
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.mT)
        u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        return q_up @ u, s, q_down @ vh.mT


def norm(factors: Factors) -> float:
    """‖ΔW‖_F = √tr(UᵀU · DDᵀ) from the two R×R Gram matrices, in float64 because they square the numbers."""
    up, down = factors.scaled_up().detach().double(), factors.down.detach().flatten(1).double()
    return float(((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt())


def recompress(
    factors: Factors, rank: int | None = None, error: float | None = None
) -> tuple[Factors, float]:
    """The best approximation (Eckart–Young) and its relative Frobenius error.

    The smallest rank whose relative error is at most ``error``, but never more than ``rank`` (and at least
    1). The singular values are split evenly between up and down, so that both stay in a half-precision
    range.
    """
    if factors.rank == 0:
        return factors, 0.0
    u, s, v = compact_svd(factors)
    kept, lost = kept_rank(s, rank, error)
    root = s[:kept].sqrt()
    down = (v[:, :kept] * root).mT.reshape(kept, *factors.down.shape[1:])
    return Factors(down, u[:, :kept] * root), lost


def kept_rank(s: Tensor, rank: int | None, error: float | None) -> tuple[int, float]:
    """How many of the descending singular values to keep for these limits, and the relative error of that."""
    # tails[k] = ‖s[k:]‖, the error of keeping k
    tails = torch.cat([s.double().square().flip(0).cumsum(0).flip(0), s.new_zeros(1).double()]).sqrt()
    total = float(tails[0])
    kept = len(s) if rank is None else min(rank, len(s))
    if error is not None:
        kept = max(1, min(kept, int((tails > error * total).sum())))
    return kept, float(tails[kept]) / total if total > 0 else 0.0
