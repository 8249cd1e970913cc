"""Orthonormal DCT and DFT along one axis, and how they fold into low-rank factors.

FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798) puts its down and up projections in frequency space: ΔW =
F⁻¹ B A F. F is linear, so it folds into the factors: r rows are transformed once per step, the activations
never. With C the orthonormal DCT-II matrix, A·C and Cᵀ·B are DCT-IIIs of A's rows and B's columns.

Shapes: every function transforms one axis of length n and leaves the others.
"""

from __future__ import annotations

import math
from functools import lru_cache

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


@lru_cache(maxsize=64)
def _twiddle(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """e^{iπk/2n}, k = 0 … ⌊n/2⌋, scaled for the orthonormal inverse and, conjugated, for the forward DCT."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward later
        k = torch.arange(n // 2 + 1, dtype=torch.float64)
        scale = torch.full_like(k, math.sqrt(n / 2))
        scale[0] = math.sqrt(n)
        inverse = torch.polar(scale, math.pi * k / (2 * n))
        forward = torch.polar(1 / scale, -math.pi * k / (2 * n))
        wanted = torch.complex128 if dtype == torch.float64 else torch.complex64
        return inverse.to(device, wanted), forward.to(device, wanted)


def _idct(x: Tensor) -> Tensor:
    """DCT-III of the last axis by one real inverse FFT of the same length (Makhoul 1980)."""
    n = x.shape[-1]
    half = n // 2
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), -x[..., n - half :].flip(-1)], -1)
    spectrum = torch.complex(x[..., : half + 1], mirrored) * _twiddle(n, x.dtype, x.device)[0]
    v = torch.fft.irfft(spectrum, n=n, dim=-1)
    out = torch.empty_like(v)
    out[..., ::2] = v[..., : n - half]
    out[..., 1::2] = v[..., n - half :].flip(-1)
    return out


def _dct(x: Tensor) -> Tensor:
    """DCT-II of the last axis, the transpose and inverse of :func:`_idct`."""
    n = x.shape[-1]
    half = n // 2
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    spectrum = torch.fft.rfft(v, dim=-1) * _twiddle(n, x.dtype, x.device)[1]
    out = torch.empty_like(x)
    out[..., : half + 1] = spectrum.real
    out[..., half + 1 :] = -spectrum.imag[..., 1 : n - half].flip(-1)
    return out


class _InverseDCT(torch.autograd.Function):
    """The transform is orthonormal, so its backward is the forward DCT: one node instead of a dozen."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return _idct(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _dct(grad.contiguous())


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """C·x along ``dim``: orthonormal DCT-II. x float32 or float64."""
    return x if x.shape[dim] == 1 else _dct(x.movedim(dim, -1)).movedim(-1, dim)


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """Cᵀ·x along ``dim``: orthonormal DCT-III, differentiable. x float32 or float64."""
    if x.shape[dim] == 1:
        return x
    return _InverseDCT.apply(x.movedim(dim, -1)).movedim(-1, dim)  # type: ignore[no-any-return, no-untyped-call]


def fold(x: Tensor, transform: str, dim: int, rank_dim: int) -> Tensor:
    """The factor x (frequency space along ``dim``) as a plain real factor, differentiable.

    ``none`` leaves it, ``dct`` gives idct(x), ``dft`` gives [Re Fx; Im Fx] joined along ``rank_dim`` (F
    unitary), which is [Re AF; Im AF] for a down and [Re F⁻¹B, −Im F⁻¹B] for an up projection, both real.
    """
    if transform == "none" or x.numel() == 0:  # a frozen gate may leave no row, which FFTs refuse
        return x
    if transform == "dct":
        return idct(x, dim)
    spectrum = torch.fft.fft(x, dim=dim, norm="ortho")
    return torch.cat([spectrum.real, spectrum.imag], rank_dim)
