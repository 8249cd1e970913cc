"""Orthonormal DCT and DFT along one axis, and how they fold into low-rank factors.

FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798) puts its down and up projections in frequency space: ΔW =
F⁻¹ B A F. F is linear, so it folds into the factors: r rows are transformed once per step, the activations
never. With C the orthonormal DCT-II matrix, A·C and Cᵀ·B are DCT-IIIs of A's rows and B's columns.

Shapes: every function transforms one axis of length n and leaves the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

TRANSFORMS = ("dct", "dft", "none")


def dct_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """C (n, n), C[k, j] = √(2/n)·c_k·cos(π(2j+1)k / 2n), c_0 = √½: the definition, for tests and small n."""
    k = torch.arange(n, dtype=torch.float64)[:, None]
    j = torch.arange(n, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(dtype)


@dataclass(frozen=True)
class _Plan:
    """What a transform of length n needs besides its FFT: index lists and twiddles, made once.

    The DCTs go by one real FFT of the same length (Makhoul 1980). ``into_half`` picks the interleaved real
    and imaginary parts of a half spectrum out of DCT coefficients, ``from_half`` does the opposite, and
    ``from_time`` and ``into_time`` order the samples, even ones first, odd ones backwards. Both spectra are
    the conjugates of the textbook's: that saves a change of sign, and the reversal in time that it means is
    in the index lists. ``real`` and ``imaginary`` spread a half spectrum over all n frequencies, but for the
    imaginary part's sign; ``mirror`` is n − k (mod n) for the half's k.
    """

    into_half: Tensor
    from_time: Tensor
    inverse: Tensor
    into_time: Tensor
    forward: Tensor
    from_half: Tensor
    real: Tensor
    imaginary: Tensor
    mirror: Tensor


@lru_cache(maxsize=64)
def _plan(n: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
        half, j = n // 2, torch.arange(n)
        k = j[: half + 1]
        scale = torch.full((half + 1,), math.sqrt(n / 2), dtype=torch.float64)
        scale[0] = math.sqrt(n)
        inverse = torch.polar(scale, -math.pi * k.double() / (2 * n))
        forward = torch.polar(1 / scale, math.pi * k.double() / (2 * n))
        into_half = torch.stack([k, (n - k) % n], 1).flatten()
        from_half = torch.where(j <= half, 2 * j, 2 * (n - j) + 1)
        from_time = torch.where(j % 2 == 0, (n - j // 2) % n, j // 2 + 1)
        into_time = torch.empty_like(from_time).scatter_(0, from_time, j)
        folded = torch.minimum(j, n - j)
        wanted = torch.complex128 if dtype == torch.float64 else torch.complex64
        return _Plan(
            into_half.to(device),
            from_time.to(device),
            inverse.to(device, wanted),
            into_time.to(device),
            forward.to(device, wanted),
            from_half.to(device),
            (2 * folded).to(device),
            (2 * folded + 1).to(device),
            ((n - k) % n).to(device),
        )


def _pick(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries ``index`` along ``dim``, which becomes the last, contiguous axis."""
    return x.index_select(dim, index).movedim(dim, -1).contiguous()


def _idct(x: Tensor, dim: int) -> Tensor:
    """DCT-III along ``dim`` ≥ 0."""
    n = x.shape[dim]
    plan = _plan(n, x.dtype, x.device)
    pairs = _pick(x, plan.into_half, dim).unflatten(-1, (n // 2 + 1, 2))
    pairs[..., 0, 1] = 0
    samples = torch.fft.irfft(torch.view_as_complex(pairs) * plan.inverse, n=n)
    return samples.index_select(-1, plan.from_time).movedim(-1, dim)


def _dct(x: Tensor, dim: int) -> Tensor:
    """DCT-II along ``dim`` ≥ 0, the transpose and inverse of :func:`_idct`."""
    plan = _plan(x.shape[dim], x.dtype, x.device)
    spectrum = torch.fft.rfft(_pick(x, plan.into_time, dim)) * plan.forward
    return torch.view_as_real(spectrum).flatten(-2).index_select(-1, plan.from_half).movedim(-1, dim)


class _InverseDCT(torch.autograd.Function):
    """The transform is orthonormal, so its backward is the forward DCT: one node instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _idct(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dct(grad, ctx.dim), None


class _InverseDCTPair(torch.autograd.Function):
    """Both factors of a square layer at once, (a along 1, b along 0): one transform of twice the rows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        down, up = _idct(torch.cat([a, b.mT]), 1).split(len(a))
        return down, up.mT

    @staticmethod
    def backward(ctx: Any, d_down: Tensor, d_up: Tensor) -> tuple[Tensor, Tensor]:
        a, b = _dct(torch.cat([d_down, d_up.mT]), 1).split(len(d_down))
        return a, b.mT


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """C·x along ``dim``: orthonormal DCT-II. x float32 or float64."""
    return x if x.shape[dim] == 1 else _dct(x, dim % x.dim())


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """Cᵀ·x along ``dim``: orthonormal DCT-III, differentiable. x float32 or float64."""
    if x.shape[dim] == 1:
        return x
    return _InverseDCT.apply(x, dim % x.dim())  # type: ignore[no-any-return, no-untyped-call]


class _RealDFT(torch.autograd.Function):
    """[Re Fx; Im Fx] of a real x, F unitary, doubled along the first axis that is not ``dim``.

    Its backward is Re(F⁻¹ g) with g = g_re + i·g_im: one real FFT of g's Hermitian part (g_k + conj
    g_{n−k})/2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        n = x.shape[dim]
        plan = _plan(n, x.dtype, x.device)
        rows = x.movedim(dim, -1)
        half = torch.view_as_real(torch.fft.rfft(rows, norm="ortho")).flatten(-2)
        imaginary = half.index_select(-1, plan.imaginary)
        imaginary[..., n // 2 + 1 :].neg_()
        return torch.cat([half.index_select(-1, plan.real), imaginary]).movedim(-1, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        real, imaginary = grad.movedim(ctx.dim, -1).chunk(2)
        n = real.shape[-1]
        plan = _plan(n, grad.dtype, grad.device)
        half = real.new_empty(*real.shape[:-1], n // 2 + 1, 2)
        torch.add(real[..., : n // 2 + 1], real.index_select(-1, plan.mirror), out=half[..., 0])
        torch.sub(imaginary[..., : n // 2 + 1], imaginary.index_select(-1, plan.mirror), out=half[..., 1])
        samples = torch.fft.irfft(torch.view_as_complex(half), n=n, norm="ortho")
        return samples.mul_(0.5).movedim(-1, ctx.dim), None


def fold(x: Tensor, transform: str, dim: int) -> Tensor:
    """The factor x (frequency space along ``dim`` 0 or 1) as a plain real factor, differentiable.

    ``none`` leaves it, ``dct`` gives idct(x), ``dft`` gives [Re Fx; Im Fx] (F unitary) joined along the rank,
    x's other leading axis: [Re AF; Im AF] for a down and [Re F⁻¹B, −Im F⁻¹B] for an up projection, both real.
    """
    if transform == "none" or x.numel() == 0:  # a frozen gate may have closed every row
        return x
    if transform == "dct":
        return idct(x, dim)
    return _RealDFT.apply(x, dim)  # type: ignore[no-any-return, no-untyped-call]


def fold_pair(a: Tensor, b: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    """(fold(a, transform, 1), fold(b, transform, 0)) for a (r, in, …) and b (out, r)."""
    if transform == "dct" and a.dim() == 2 and a.shape == b.mT.shape and a.shape[1] > 1 and a.numel():
        return _InverseDCTPair.apply(a, b)  # type: ignore[no-any-return, no-untyped-call]
    return fold(a, transform, dim=1), fold(b, transform, dim=0)
