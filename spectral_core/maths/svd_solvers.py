"""The three ways to a few singular triplets, and the residual that says whether to believe one.

* ``randomised``: block Krylov iteration from a fixed random start (Musco & Musco 2015, arXiv 1504.05477; the
  same start as Halko et al. 2011, but every power of WᵀW is kept, so that a flat spectrum needs tens of
  products instead of hundreds). The number of steps follows from the matrix, never from a setting: steps
  stop when the estimated residual is small and the extrapolated effort says when to look again.
* ``gram``: ``eigh`` of the Gram matrix of the smaller side, in float64.
* ``full``: the whole SVD in float64, for columns far down the spectrum.

Precision: whatever decides about a result is computed in float64 on every device. On the CPU the Krylov
steps begin in float32, where a product costs half; their result is only a starting guess, which float64
measures and, if need be, finishes. Where float32 cannot resolve the gap, and on every other device, the steps
run in float64: TF32 and autocast touch float32 only and so cannot reach a GPU's result, and no process-wide
switch has to be thrown and restored.

The whole weight is never copied to float64 for a few products: :func:`times` widens it block by block.

Bases are held as ROWS, (count, dim): with so few of them a product with W is then two to three times faster
than with columns.

Shapes: W (m, n); k = min(m, n); u (count, m), s (count,), v (count, n).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

KRYLOV_SHARE = 0.4  # of k: beyond this many basis rows the Gram matrix is cheaper
HOPELESS_SHARE = 0.2  # of k: a residual that is still above HOPELESS here will not make it in time
HOPELESS = 10.0
SAFETY = 0.5  # the Krylov steps aim at this share of the tolerance
POLISH_STEPS = 4
FIRST_CHECK = 4  # steps before the first look at the residual, which costs as much as a step; three seldom do
WIDENED = 128  # rows of the weight in float64 at a time: they stay in the cache
GUARD = 2  # rows beyond the wanted ones that the final Rayleigh–Ritz step takes: the gap needs the first


class Triplets(NamedTuple):
    """Singular triplets in rows, float64, largest first: u (count, m), s (count,), v (count, n)."""

    u: Tensor
    s: Tensor
    v: Tensor


def orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis of the row space, (count, dim)."""
    made: Tensor = torch.linalg.qr(rows.mT)[0].mT
    return made


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight in the precision of ``rows`` (count, ·); a narrower weight is widened block by block."""
    if weight.dtype == rows.dtype:
        return rows @ weight
    if weight.stride(0) < weight.stride(1):  # the blocks are contiguous pieces of memory
        return torch.cat([rows @ part.to(rows.dtype) for part in weight.split(WIDENED, 1)], 1)
    total = rows.new_zeros(rows.shape[0], weight.shape[1])
    for some, part in zip(rows.split(WIDENED, 1), weight.split(WIDENED), strict=True):
        total.addmm_(some, part.to(rows.dtype))
    return total


def gap_around(s: Tensor, columns: tuple[int, ...], k: int) -> float:
    """The smallest distance between a chosen singular value and one that was not chosen.

    For the top r columns this is σ_r − σ_{r+1}. Where all k are chosen what lies beyond is 0 (the null
    space of the longer side).

    Args:
        s: estimated singular values from the top, at least one more than max(columns) unless that is k − 1.
    """
    values, chosen = s.tolist(), set(columns)
    others = [value for i, value in enumerate(values) if i not in chosen]
    if len(values) >= k:
        others.append(0.0)
    return float(min(abs(values[i] - other) for i in chosen for other in others))


def residual(found: Triplets, image: Tensor, power: Tensor, columns: tuple[int, ...]) -> float:
    """η = √(‖WV−US‖_F² + ‖WᵀU−VS‖_F²) / gap over the chosen columns; the true angle stays below it (Wedin).

    Args:
        found: triplets from the top, one more than max(columns) unless all are there.
        image: (WV)ᵀ (count, m).
        power: UᵀW (count, n).

    Returns:
        η ≥ 0; ``inf`` where the gap is zero.
    """
    index = torch.tensor(columns, device=found.s.device)
    scale = found.s[index, None]
    error = math.hypot(
        torch.linalg.vector_norm(image[index] - scale * found.u[index]).item(),
        torch.linalg.vector_norm(power[index] - scale * found.v[index]).item(),
    )
    gap = gap_around(found.s, columns, min(image.shape[1], power.shape[1]))
    return error / gap if gap > 0 else math.inf


def rayleigh_ritz(weight: Tensor, basis: Tensor, columns: tuple[int, ...]) -> tuple[Triplets, float, Tensor]:
    """The best triplets with right vectors inside ``basis`` (count, n), and their η.

    All of it in the precision of ``basis``, float64, whatever the weight's.

    U = W V / S, taken from the SVD of the slim product W V so that U is orthonormal to rounding also where S
    spans many orders of magnitude.

    Returns:
        (triplets, η, UᵀW (count, n), which is the next power step).
    """
    image = times(basis, weight.mT)
    q, triangle = torch.linalg.qr(image.mT)
    left, s, right = torch.linalg.svd(triangle, full_matrices=False)
    found = Triplets((q @ left).mT, s, right @ basis)
    power = times(found.u, weight)
    return found, residual(found, right @ image, power, columns), power


@lru_cache(maxsize=16)
def _start(block: int, dim: int) -> Tensor:
    """The same random rows on every call (the seed is fixed, so results are deterministic), float64, CPU.

    Kept, as a model has many layers of few sizes; nobody writes to them.
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0x5EED)
        rows = torch.randn(block, dim, generator=generator, dtype=torch.float64)
        return orthonormal_rows(rows)


def krylov_basis(
    weight: Tensor, columns: tuple[int, ...], block: int, tolerance: float
) -> tuple[Tensor | None, bool]:
    """Approximate right singular vectors by block Krylov iteration, in the precision of ``weight``.

    Args:
        weight: (m, n).
        columns: the indices wanted.
        block: rows per step; more than max(columns) + 1, so that a cluster as wide as the wanted block is
            seen whole.
        tolerance: the η asked for; the estimate has to be below SAFETY of it.

    Returns:
        ((block, n) the leading Ritz vectors times WᵀW, or None when they are out of reach; whether it was
        this precision that put them there, rather than an effort beyond the Gram matrix's).
    """
    n, k = weight.shape[1], min(weight.shape)
    limit = int(KRYLOV_SHARE * k) // block
    if limit < 3:
        return None, False
    basis = weight.new_empty(limit * block, n)
    image = torch.empty_like(basis)
    rows, check_at, last = _start(block, n).to(weight), FIRST_CHECK, math.inf
    for step in range(1, limit + 1):
        new, known = slice((step - 1) * block, step * block), step * block
        basis[new] = rows
        image[new] = (rows @ weight.mT) @ weight
        v = basis[:known]
        if step >= check_at or step == limit:
            ritz, eta, floor, resolves = _ritz_check(v, image[:known], columns, block, tolerance)
            stalled = last < 1 and eta > last / 2
            if eta <= max(SAFETY * tolerance, floor) or (stalled and eta <= tolerance):
                return ritz @ image[:known], False
            if stalled or not resolves:
                return None, True
            if known >= HOPELESS_SHARE * k and eta > HOPELESS:
                return None, False
            check_at, last = step + max(1, step // 4), eta
        # Orthogonalised before and after the QR: a block that is rounding noise (an invariant subspace was
        # found, as in a rank-deficient W) becomes fresh directions instead of copies of old ones.
        rows = orthonormal_rows(image[new] - (image[new] @ v.mT) @ v)
        rows = orthonormal_rows(rows - (rows @ v.mT) @ v)
    return None, False


class RitzCheck(NamedTuple):
    """What a Krylov basis holds so far: Ritz coefficients (block, rows), the estimated η, the η that rounding
    allows, and whether this precision can be expected to reach the tolerance."""

    ritz: Tensor
    eta: float
    floor: float
    resolves: bool


def _ritz_check(
    v: Tensor, image: Tensor, columns: tuple[int, ...], block: int, tolerance: float
) -> RitzCheck:
    """Read η off image = V WᵀW, without another product with W.

    It is that of the Ritz vectors times WᵀW, which are at hand as ritz·image. Their error lies in the next
    Krylov block, so that the power step shrinks it by about the last block's mean energy over σ².
    """
    projected = (v @ image.mT).double()
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    values, ritz = values.flip(0)[:block], vectors.mT.flip(0)[:block].to(v)
    s, index = values.clamp_min(0).sqrt(), list(columns)
    smallest = s[max(columns)].item()
    gap = gap_around(s, columns, block + 1)
    if gap * smallest <= 0:
        return RitzCheck(ritz, math.inf, math.inf, True)
    error = ritz[index] @ image - values[index, None].to(v) * (ritz[index] @ v)
    eta = torch.linalg.vector_norm(error.double() / s[index, None]).item() / gap
    eta *= min(1.0, projected.diagonal()[-block:].mean().item() / smallest**2)
    noise = 2 * torch.finfo(v.dtype).eps * values[0].item() / smallest
    # Early gaps are chance, so the outlook goes by the mean spacing. Where the spectrum falls off within the
    # block, power steps in float64 clean up whatever is left.
    spacing = max(gap, (smallest - s[-1].item()) / (block - 1 - max(columns)))
    falls_off = (s[-1].item() / smallest) ** 2 < 0.5
    return RitzCheck(ritz, eta, noise / gap, falls_off or noise / spacing <= tolerance)


def _tall(weight: Tensor) -> Tensor:
    return weight if weight.shape[0] >= weight.shape[1] else weight.mT


def _oriented(found: Triplets, weight: Tensor) -> Triplets:
    """Triplets of the tall form as triplets of ``weight``."""
    return found if weight.shape[0] >= weight.shape[1] else Triplets(found.v, found.s, found.u)


def randomised(
    weight: Tensor, columns: tuple[int, ...], oversample: int, tolerance: float, fast: Tensor | None = None
) -> tuple[Triplets, float] | None:
    """Triplets whose η, measured in float64, is at most ``tolerance``, or None.

    Args:
        weight: (m, n) float32 or float64.
        fast: the same in float32 for the first steps, or None.
    """
    tall, block = _tall(weight), max(columns) + 1 + oversample
    basis, too_narrow = None, True
    if fast is not None:
        basis, too_narrow = krylov_basis(_tall(fast), columns, block, tolerance)
    if basis is None and too_narrow:
        basis, _ = krylov_basis(tall.double(), columns, block, tolerance)
    if basis is None:
        return None
    basis = basis.double()
    few = orthonormal_rows(basis[: max(columns) + 1 + GUARD])  # mostly enough, and float64 products are dear
    found, eta, _ = rayleigh_ritz(tall, few, columns)
    if eta <= tolerance:
        return _oriented(found, weight), eta
    basis, last = orthonormal_rows(basis), math.inf
    for _ in range(POLISH_STEPS):
        found, eta, power = rayleigh_ritz(tall, basis, columns)
        if eta <= tolerance:
            return _oriented(found, weight), eta
        if eta > last / 2:
            return None
        basis, last = orthonormal_rows(power), eta
    return None


def gram(weight: Tensor, columns: tuple[int, ...], oversample: int) -> tuple[Triplets, float]:
    """Triplets from ``eigh`` of the smaller Gram matrix in float64, and their η. ``weight``: (m, n)."""
    tall = _tall(weight.double())
    wanted = min(max(columns) + 1 + oversample, tall.shape[1])
    vectors = torch.linalg.eigh(tall.mT @ tall)[1]
    found, eta, _ = rayleigh_ritz(tall, vectors[:, -wanted:].mT.flip(0).contiguous(), columns)
    return _oriented(found, weight), eta


def full(weight: Tensor, columns: tuple[int, ...]) -> tuple[Triplets, float]:
    """All triplets by the full SVD in float64, and the η of the chosen ones. ``weight``: (m, n)."""
    weight = weight.double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    found = Triplets(u.mT, s, v)
    return found, residual(found, v @ weight.mT, found.u @ weight, columns)
