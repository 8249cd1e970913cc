"""The Cayley transform: rotations from skew-symmetric matrices.

R = (I + Q)(I − Q)⁻¹ with Qᵀ = −Q is orthogonal with determinant 1, and R = I at Q = 0. Source: Spectral
Adapter, rotational form (Zhang & Pilanci, arXiv 2405.13952). What the adapter needs is K = R − I, which is
solved for directly: forming R and subtracting I loses the small angles.

Packing: the r(r−1)/2 entries are Q's strict upper triangle row by row, Q₀₁, Q₀₂, …, Q₀,r₋₁, Q₁₂, …; the lower
triangle is its negative. All is differentiable; float32 at least, float64 is kept.

Shapes: entries (…, r(r−1)/2); Q, R, K (…, r, r): several rotations at once where there are leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SpectralAdapterError


def skew_size(r: int) -> int:
    """How many entries a skew-symmetric (r, r) matrix has: r(r−1)/2."""
    return r * (r - 1) // 2


def skew_from_entries(entries: Tensor, r: int) -> Tensor:
    """Q (…, r, r), Q = −Qᵀ, from its packed upper triangle.

    Raises:
        SpectralAdapterError: when the number of entries does not belong to r.
    """
    if r < 1 or entries.dim() < 1 or entries.shape[-1] != skew_size(r):
        raise SpectralAdapterError(
            f"rotation of rank {r}: found entries of shape {tuple(entries.shape)}, expected "
            f"({skew_size(max(r, 1))},) = r(r-1)/2"
        )
    wide = entries if entries.dtype == torch.float64 else entries.float()
    row, column = torch.triu_indices(r, r, offset=1, device=entries.device)
    upper = wide.new_zeros(*wide.shape[:-1], r, r)
    upper[..., row, column] = wide
    return upper - upper.mT


def cayley_minus_identity(entries: Tensor, r: int) -> Tensor:
    """K = R − I = (I − Q)⁻¹ 2Q, (…, r, r). I − Q is never singular: its eigenvalues are 1 ± iθ."""
    q = skew_from_entries(entries, r)
    identity = torch.eye(r, dtype=q.dtype, device=q.device)
    made: Tensor = torch.linalg.solve(identity - q, 2 * q)
    return made
