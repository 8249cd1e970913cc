"""The compact form of Spectral R: the basis left out of the file, found again in the base model.

Instead of U₁ (m, r) and V₁ (n, r) a file keeps S₁ and a fingerprint P_U = Ω_U U₁, P_V = Ω_V V₁ of k = r + 16
rows, Ω being ±1 matrices drawn from a frozen bit generator. On load the base weight's own singular pairs Ũ, Ṽ
(the stored columns and up to 8 neighbours on either side, into which rounding and fine-tuning mix them) are
turned back by one least squares over both sides, [Ω_U Ũ; Ω_V Ṽ] O ≈ [P_U; P_V], and its polar factor: the
same O for both, so that signs and rotations within near-degenerate groups come back as they were. ŨO and ṼO
are used with the stored S₁.

How far the base may differ (measured by the specification): float16 leaves a residual of 2e-4, bfloat16 2e-3,
float8 3e-2, another fine-tune 0.1 and more, an unrelated model about 1. The error of ΔW is about twice the
residual.

Shapes: weight (m, n); u (m, r), s (r,), v (n, r); P_U and P_V (k, r), float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from .svd import Columns, as_matrix, select_columns

EXTRA_ROWS = 16  # k = r + 16
NEIGHBOURS = 8
SAME_RESIDUAL, SAME_SCALE = 5e-3, 5e-4
WARN_RESIDUAL = 5e-2

Verdict = Literal["same", "warn", "refuse"]


@dataclass(frozen=True)
class Realigned:
    """A basis found again.

    Attributes:
        u, s, v: (m, r), (r,) the stored S₁, (n, r); float32, on the weight's device.
        residual: ‖[Ω_U ŨO; Ω_V ṼO] − [P_U; P_V]‖_F / ‖[P_U; P_V]‖_F.
        scale_error: max|ΔS/S|, S being diag((ŨO)ᵀ W ṼO) here and S₁ in the file.
        verdict: ``same`` (the base it was trained on), ``warn`` (quantised or lightly fine-tuned: ΔW is
            off by about twice the residual) or ``refuse`` (another model: do not use u and v).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    residual: float
    scale_error: float
    verdict: Verdict


def _splitmix64(counter: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014) on uint64, modulo 2⁶⁴."""
    with np.errstate(over="ignore"):
        z = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray[Any, Any] = z ^ (z >> np.uint64(31))
        return mixed


def sign_rows(seed: int, stream: int, rows: int, dim: int) -> Tensor:
    """(rows, dim) of ±1 in float64, a function of the arguments alone: frozen, files depend on it.

    Entry i (row-major) is +1 where the top bit of splitmix64(start + (i+1)·γ) is set, γ = 0x9E3779B97F4A7C15,
    start = splitmix64(seed + (stream+1)·γ), all modulo 2⁶⁴.
    """
    if not 0 <= seed < 2**64:
        raise SpectralAdapterError(f"projection seed: found {seed}, expected 0 <= seed < 2**64")
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = _splitmix64(np.array([(seed + (stream + 1) * gamma) & mask], dtype=np.uint64))
    with np.errstate(over="ignore"):
        counter = start + np.arange(1, rows * dim + 1, dtype=np.uint64) * np.uint64(gamma)
    bits = (_splitmix64(counter) >> np.uint64(63)).astype(np.float64)
    return torch.from_numpy((2.0 * bits - 1.0).reshape(rows, dim))


def project_basis(u: Tensor, v: Tensor, seed: int, k: int | None = None) -> tuple[Tensor, Tensor]:
    """The fingerprint (P_U, P_V), each (k, r) float32, of a basis u (m, r), v (n, r); k = r + 16 by default.

    Raises:
        SpectralAdapterError: u and v of different ranks, or k below the rank.
    """
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
        raise SpectralAdapterError(
            f"basis of shapes {tuple(u.shape)} and {tuple(v.shape)}: expected (m, r) and (n, r)"
        )
    r = u.shape[1]
    rows = r + EXTRA_ROWS if k is None else k
    if rows < r:
        raise SpectralAdapterError(f"projection rows: found {rows}, expected at least the rank, {r}")
    return _project(u, seed, 0, rows).float(), _project(v, seed, 1, rows).float()


def _project(basis: Tensor, seed: int, stream: int, rows: int) -> Tensor:
    wide = basis.detach().to("cpu").to(torch.float64)
    return sign_rows(seed, stream, rows, wide.shape[0]) @ wide


def candidates(columns: tuple[int, ...], available: int) -> tuple[int, ...]:
    """The stored columns and their neighbours, at most r + 16, so that 2k = 2r + 32 equations determine them.

    A block at the top has the 8 below it, a later block 8 on either side (not everything above it: a block
    far down would have more unknowns than equations), listed columns as wide a neighbourhood as fits.
    """
    for width in range(NEIGHBOURS, 0, -1):
        near = {j for i in columns for j in range(i - width, i + width + 1) if 0 <= j < available}
        if len(near) <= len(columns) + 2 * NEIGHBOURS:
            return tuple(sorted(near))
    return tuple(sorted(columns))


def realign(
    weight: Tensor,
    s: Tensor,
    p_u: Tensor,
    p_v: Tensor,
    seed: int,
    columns: Columns,
    *,
    device: torch.device | str | None = None,
) -> Realigned:
    """Find the stored basis in a base weight.

    Args:
        weight: (m, n) or (out, in, kh, kw), the base weight at hand.
        s: (r,) the stored singular values.
        p_u, p_v: (k, r) the stored fingerprint.
        seed: of the projection.
        columns: which columns the basis was.
        device: where to compute the singular pairs.

    Raises:
        SpectralAdapterError: shapes that do not belong together, or a weight that select_columns refuses. A
            base that differs is not an error here but the verdict ``refuse``.
    """
    matrix = as_matrix(weight)
    wanted = columns.resolve(min(matrix.shape))
    r = len(wanted)
    if s.shape != (r,) or p_u.shape != p_v.shape or p_u.ndim != 2 or p_u.shape[1] != r:
        raise SpectralAdapterError(
            f"compact basis of {r} columns: found S {tuple(s.shape)}, projections {tuple(p_u.shape)} and "
            f"{tuple(p_v.shape)}; expected ({r},) and twice (k, {r}). The file is damaged"
        )
    near = candidates(wanted, min(matrix.shape))
    if 2 * p_u.shape[0] < len(near):
        raise SpectralAdapterError(
            f"compact basis of {r} columns: found {p_u.shape[0]} projected rows, expected {r + EXTRA_ROWS}. "
            "The file is damaged"
        )
    # Neighbours may be numerically zero: they only take up what rounding mixed in.
    pairs = select_columns(weight, Columns.listed(near), smallest_ratio=0.0, device=device)
    with torch.inference_mode(False), torch.no_grad():
        u, v = pairs.u.cpu().double(), pairs.v.cpu().double()
        stored = torch.cat([p_u, p_v]).detach().cpu().double()
        seen = torch.cat([_project(u, seed, 0, p_u.shape[0]), _project(v, seed, 1, p_v.shape[0])])
        solution = torch.linalg.lstsq(seen, stored).solution
        left, _, right = torch.linalg.svd(solution, full_matrices=False)
        rotation = left @ right
        miss = torch.linalg.vector_norm(seen @ rotation - stored)
        residual = (miss / torch.linalg.vector_norm(stored)).item()
        here = (rotation.square() * pairs.s.cpu().double()[:, None]).sum(0)
        reference = s.detach().cpu().double()
        scale_error = ((here - reference).abs() / reference.abs().clamp_min(1e-30)).max().item()
        target = weight.device
        return Realigned(
            (u @ rotation).float().to(target),
            s.detach().float().to(target),
            (v @ rotation).float().to(target),
            residual,
            scale_error,
            judge(residual, scale_error),
        )


def judge(residual: float, scale_error: float) -> Verdict:
    """The verdict on a residual and a scale error; NaN is refused."""
    if residual <= SAME_RESIDUAL and scale_error <= SAME_SCALE:
        return "same"
    return "warn" if residual <= WARN_RESIDUAL else "refuse"
