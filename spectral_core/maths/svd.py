"""Chosen singular triplets of a weight: top, a block, a list, or the bottom.

W ≈ U₁ diag(S₁) V₁ᵀ with U₁, S₁, V₁ the chosen columns of the SVD W = U S Vᵀ. Source: Spectral Adapter
(Zhang & Pilanci, arXiv 2405.13952), which adapts the top columns; a result is believed only by its residual
η (svd_solvers.py). Signs are fixed: the largest-magnitude entry of every u is positive. That makes the result
reproducible here; it does not make it reproducible from another copy of the weight, which is why adapters
store their basis.

Shapes: weight (m, n), convolutions (out, in, kh, kw) as (out, in·kh·kw); u (m, r), s (r,), v (n, r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from . import svd_solvers as solvers

OVERSAMPLE = 12
LEAST_OVERSAMPLE = 8
TOLERANCE = 1e-4
SMALLEST_RATIO = 1e-6  # σ/σ₁ below which a column is rounding noise
FULL_SHARE = 0.5  # of min(m, n): columns below this depth are left to the full SVD


@dataclass(frozen=True)
class Columns:
    """Which singular columns, counted from the largest singular value (index 0).

    Use the constructors: ``Columns.block(k, r)`` = [k·r, (k+1)·r), ``Columns.listed([...])`` (the given order
    is kept), ``Columns.bottom(r)`` = the r smallest. Exactly one of ``indices`` and ``last`` is set.
    """

    indices: tuple[int, ...] = ()
    last: int = 0

    def __post_init__(self) -> None:
        if bool(self.indices) == (self.last > 0) or self.last < 0:
            raise SpectralAdapterError(
                f"columns: found indices {list(self.indices)} and bottom count {self.last}; expected either "
                "at least one index or a bottom count of at least 1"
            )
        repeated = sorted({i for i in self.indices if self.indices.count(i) > 1})
        if repeated or any(i < 0 for i in self.indices):
            raise SpectralAdapterError(
                f"columns {list(self.indices)}: expected distinct indices counted from 0 (the largest "
                f"singular value); {f'{repeated} are repeated' if repeated else 'some are negative'}. "
                "For the smallest singular values use Columns.bottom(count)"
            )

    @classmethod
    def block(cls, k: int, r: int) -> Columns:
        """The k-th block of r columns, top first: indices k·r … (k+1)·r − 1."""
        if k < 0 or r < 1:
            raise SpectralAdapterError(f"column block: found k = {k}, r = {r}; expected k >= 0 and r >= 1")
        return cls(indices=tuple(range(k * r, (k + 1) * r)))

    @classmethod
    def listed(cls, indices: Sequence[int]) -> Columns:
        """Exactly these indices, in this order."""
        return cls(indices=tuple(int(i) for i in indices))

    @classmethod
    def bottom(cls, r: int) -> Columns:
        """The r smallest singular values."""
        return cls(last=r)

    def resolve(self, available: int) -> tuple[int, ...]:
        """The indices in a matrix with ``available`` = min(m, n) singular values.

        Raises:
            SpectralAdapterError: when the matrix has fewer columns than asked for.
        """
        if self.last:
            if self.last > available:
                raise SpectralAdapterError(
                    f"bottom {self.last} columns asked of a matrix with {available} singular values: use a "
                    f"rank of at most {available}, or leave this layer out"
                )
            return tuple(range(available - self.last, available))
        if max(self.indices) >= available:
            raise SpectralAdapterError(
                f"singular column {max(self.indices)} asked of a matrix with {available} singular values "
                f"(0 to {available - 1}): use a smaller rank or block, or leave this layer out"
            )
        return self.indices


@dataclass(frozen=True)
class SVDColumns:
    """Chosen singular triplets of one weight, float32, on the weight's device.

    Attributes:
        u: (m, r) left vectors, orthonormal columns.
        s: (r,) singular values.
        v: (n, r) right vectors, orthonormal columns.
        columns: the indices, in the order of the columns of u and v.
        solver: ``randomised``, ``gram`` or ``full``.
        residual: η, a bound on the sine of the largest angle to the true subspace. ``inf`` or above 1 means
            that the gap to a neighbouring column is below rounding, where no method can tell them apart.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    columns: tuple[int, ...]
    solver: str
    residual: float


def as_matrix(weight: Tensor) -> Tensor:
    """The weight as (out, in) or, for a convolution, (out, in·kh·kw); a view where possible.

    Raises:
        SpectralAdapterError: fewer than two dimensions, an empty one, meta, or not floating point.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise SpectralAdapterError(
            f"weight of shape {tuple(weight.shape)}: expected (out, in) or (out, in, kh, kw), not empty. "
            "Biases and norms have no spectrum; leave this layer out"
        )
    if weight.device.type == "meta":
        raise SpectralAdapterError(
            f"weight of shape {tuple(weight.shape)} is on the meta device and has no values: load the model "
            "before asking for its spectrum"
        )
    if not weight.is_floating_point():
        raise SpectralAdapterError(
            f"weight of dtype {weight.dtype}: expected a floating-point weight. Dequantise it first"
        )
    return weight.detach().flatten(1)


def select_columns(
    weight: Tensor,
    columns: Columns,
    *,
    oversample: int = OVERSAMPLE,
    tolerance: float = TOLERANCE,
    smallest_ratio: float = SMALLEST_RATIO,
    device: torch.device | str | None = None,
) -> SVDColumns:
    """The chosen singular triplets of a weight. Deterministic; never changes the weight; no gradient.

    Args:
        weight: (m, n) or (out, in, kh, kw), any floating dtype.
        columns: which ones.
        oversample: extra columns that the randomised solver carries; at least 8.
        tolerance: the largest η at which the randomised result is accepted; otherwise the Gram matrix.
        smallest_ratio: columns with σ below this share of σ₁ are refused; 0 takes everything.
        device: where to compute; default the weight's own, or the CPU where that has no float64.

    Returns:
        SVDColumns on the weight's device.

    Raises:
        SpectralAdapterError: a weight that as_matrix refuses, NaN or Inf, columns out of range, or columns
            whose singular value is numerically zero (a zero matrix has only such ones).
    """
    if oversample < LEAST_OVERSAMPLE or tolerance <= 0:
        raise SpectralAdapterError(
            f"found oversample = {oversample}, tolerance = {tolerance}; expected at least {LEAST_OVERSAMPLE} "
            "and a positive tolerance"
        )
    # A tensor made under inference_mode could never take part in training, so none is made here.
    with torch.inference_mode(False), torch.no_grad():
        matrix = as_matrix(weight)
        indices = columns.resolve(min(matrix.shape))
        fast, work = _work_copies(matrix, device)
        found, eta, solver = _solve(work, fast, indices, oversample, tolerance)
        picked = list(indices)
        u, s, v = found.u[picked], found.s[picked], found.v[picked]
        _refuse_negligible(s, found.s[0].item(), indices, smallest_ratio)
        sign = torch.where(u.gather(1, u.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
        u, v = u * sign, v * sign
        target = matrix.device
        return SVDColumns(
            u.mT.to(target, torch.float32).contiguous(),
            s.to(target, torch.float32),
            v.mT.to(target, torch.float32).contiguous(),
            indices,
            solver,
            eta,
        )


def top_columns(
    weight: Tensor,
    count: int,
    *,
    oversample: int = OVERSAMPLE,
    tolerance: float = TOLERANCE,
    device: torch.device | str | None = None,
) -> SVDColumns:
    """The ``count`` largest singular triplets; see select_columns."""
    return select_columns(
        weight, Columns.block(0, count), oversample=oversample, tolerance=tolerance, device=device
    )


def _work_copies(matrix: Tensor, device: torch.device | str | None) -> tuple[Tensor | None, Tensor]:
    """(fast, work) on the computing device: the weight in float32 for the first steps (None on a GPU, and
    where its squares would leave the range), and as exact as it is, in float32 or float64: whatever decides
    is computed in float64 from it. MPS has no float64: the CPU computes for it.

    Raises:
        SpectralAdapterError: NaN or Inf.
    """
    where = torch.device(device) if device is not None else matrix.device
    if where.type == "mps":
        where = torch.device("cpu")
    matrix = matrix.to(where)
    narrow = matrix.to(torch.float32)
    size = torch.linalg.vector_norm(narrow).item()
    if not math.isfinite(size):  # the quick look: one pass, but it also overflows beyond 1e19
        bad = int((~torch.isfinite(matrix.to(torch.float64))).sum())
        if bad:
            raise SpectralAdapterError(
                f"weight of shape {tuple(matrix.shape)} holds {bad} NaN or infinite values: the checkpoint "
                "is damaged or was cast to too narrow a type; load it again in another one"
            )
    fast = narrow if where.type == "cpu" and 1e-12 < size < 1e12 else None
    exact = narrow if where.type == "cpu" and matrix.dtype != torch.float64 else matrix.to(torch.float64)
    return fast, exact


def _solve(
    work: Tensor, fast: Tensor | None, indices: tuple[int, ...], oversample: int, tolerance: float
) -> tuple[solvers.Triplets, float, str]:
    """(triplets from the top, η, solver) by the cheapest solver whose result can be believed."""
    k = min(work.shape)
    if max(indices) + 1 > FULL_SHARE * k and k > 2 * LEAST_OVERSAMPLE:
        return *solvers.full(work, indices), "full"
    accepted = solvers.randomised(work, indices, oversample, tolerance, fast)
    if accepted is not None:
        return *accepted, "randomised"
    return *solvers.gram(work, indices, oversample), "gram"


def _refuse_negligible(s: Tensor, largest: float, indices: tuple[int, ...], smallest_ratio: float) -> None:
    if largest == 0.0:
        raise SpectralAdapterError(
            "the weight is zero everywhere and has no singular directions: leave this layer out"
        )
    low = [i for i, value in zip(indices, s.tolist(), strict=True) if value < smallest_ratio * largest]
    if low:
        raise SpectralAdapterError(
            f"singular columns {low} are numerically zero (below {smallest_ratio:g} of the largest, "
            f"{largest:.4g}): the weight's rank is lower than asked for. Use a smaller rank or an earlier "
            "block"
        )
