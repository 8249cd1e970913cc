"""Orthonormal DCT and DFT along one axis, and how they fold into low-rank factors.

FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798) puts its down and up projections in frequency space: ΔW =
F⁻¹ B A F. F is linear, so it folds into the factors: r rows are transformed once per step, the activations
never. With C the orthonormal DCT-II matrix, A·C and Cᵀ·B are DCT-IIIs of A's rows and B's columns.

Shapes: every function transforms one axis of length n and leaves the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .grouping import alike

Transform = Literal["dct", "dft", "none"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
_TOGETHER = 2**18  # numbers in one transform of several factors: what it holds on the way stays small


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


def _idct(rows: Tensor) -> Tensor:
    """DCT-III of rows (N, n)."""
    n = rows.shape[1]
    plan = _plan(n, rows.dtype, rows.device)
    pairs = rows.index_select(1, plan.into_half).unflatten(1, (n // 2 + 1, 2))
    pairs[:, 0, 1] = 0
    samples = torch.fft.irfft(torch.view_as_complex(pairs).mul_(plan.inverse), n=n)
    made: Tensor = samples.index_select(1, plan.from_time)
    return made


def _dct(rows: Tensor) -> Tensor:
    """DCT-II of rows (N, n), the transpose and inverse of :func:`_idct`."""
    plan = _plan(rows.shape[1], rows.dtype, rows.device)
    spectrum = torch.fft.rfft(rows.index_select(1, plan.into_time)).mul_(plan.forward)
    return torch.view_as_real(spectrum).flatten(1).index_select(1, plan.from_half)


def _real_dft(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Re Fx, Im Fx) of real rows x (N, n), F unitary."""
    n = rows.shape[1]
    plan = _plan(n, rows.dtype, rows.device)
    half = torch.view_as_real(torch.fft.rfft(rows, norm="ortho")).flatten(1)
    imaginary = half.index_select(1, plan.imaginary)
    imaginary[:, n // 2 + 1 :].neg_()
    return half.index_select(1, plan.real), imaginary


def _real_dft_transposed(real: Tensor, imaginary: Tensor) -> Tensor:
    """The transpose of :func:`_real_dft`: Re(F⁻¹ g) of g = real + i·imaginary, which is one real FFT of g's
    Hermitian part (g_k + conj g_{n−k})/2."""
    n = real.shape[1]
    plan = _plan(n, real.dtype, real.device)
    half = real.new_empty(len(real), n // 2 + 1, 2)
    torch.add(real[:, : n // 2 + 1], real.index_select(1, plan.mirror), out=half[..., 0])
    torch.sub(imaginary[:, : n // 2 + 1], imaginary.index_select(1, plan.mirror), out=half[..., 1])
    made: Tensor = torch.fft.irfft(torch.view_as_complex(half), n=n, norm="ortho").mul_(0.5)
    return made


class _Folded(torch.autograd.Function):
    """The transform of each tensor along its axis of ``dims``, all of one length n: their rows together.

    For ``dft`` the first other axis is doubled. The transforms are orthonormal, so their backward is their
    transpose: one node, which keeps nothing, instead of a dozen for each tensor.
    """

    @staticmethod
    def forward(ctx: Any, transform: str, dims: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.dims = transform, dims
        ctx.shapes = tuple(_moved(x.shape, dim) for x, dim in zip(tensors, dims, strict=True))
        rows = _joined(_rows(tensors, dims))
        if transform == "dct":
            return _parts(_idct(rows), ctx.shapes, dims)
        sizes = [math.prod(shape[:-1]) for shape in ctx.shapes]
        pairs = zip(*(part.split(sizes) for part in _real_dft(rows)), strict=True)
        doubled = tuple((2 * shape[0], *shape[1:]) for shape in ctx.shapes)
        return _parts(torch.cat([part for pair in pairs for part in pair]), doubled, dims)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        seen = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(grads)
        if seen:  # a layer that did not run has no gradient, which is not a gradient of zero
            dims, shapes = tuple(ctx.dims[i] for i in seen), tuple(ctx.shapes[i] for i in seen)
            given = _rows([g for g in grads if g is not None], dims)
            if ctx.transform == "dct":
                rows = _dct(_joined(given))
            else:
                halves = zip(*(block.chunk(2) for block in given), strict=True)
                rows = _real_dft_transposed(*(_joined(half) for half in halves))
            for i, part in zip(seen, _parts(rows, shapes, dims), strict=True):
                found[i] = part
        return None, None, *found


def _moved(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The shape with axis ``dim`` last."""
    return (*shape[:dim], *shape[dim + 1 :], shape[dim])


def _rows(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """All that lies along the axes ``dims``, (N, n) of each tensor."""
    return [_turned(x, dim, x.dim() - 1).flatten(0, -2) for x, dim in zip(tensors, dims, strict=True)]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def _parts(rows: Tensor, shapes: Sequence[tuple[int, ...]], dims: Sequence[int]) -> tuple[Tensor, ...]:
    """The rows of each tensor in its shape, of which ``shapes`` has the axis ``dims`` last."""
    split = rows.split([math.prod(shape[:-1]) for shape in shapes])
    each = zip(split, shapes, dims, strict=True)
    return tuple(_turned(part.view(shape), len(shape) - 1, dim) for part, shape, dim in each)


def _turned(x: Tensor, source: int, target: int) -> Tensor:
    return x if source == target else x.movedim(source, target)


def fold(x: Tensor, transform: str, dim: int) -> Tensor:
    """The factor x (frequency space along ``dim``) as a plain real factor, differentiable.

    ``none`` leaves it, ``dct`` gives Cᵀ·x (C the orthonormal DCT-II), ``dft`` gives [Re Fx; Im Fx] (F
    unitary) joined along the rank, x's other leading axis: [Re AF; Im AF] for a down and [Re F⁻¹B, −Im F⁻¹B]
    for an up projection, both real.
    """
    return fold_many([(x, dim)], transform)[0]


def fold_many(factors: Sequence[tuple[Tensor, int]], transform: str) -> list[Tensor]:
    """:func:`fold` of every (x, dim), those of one length together: a model has hundreds of small factors,
    and a transform of one costs mostly its dozen calls."""
    found = [x for x, _ in factors]
    if transform == "none":
        return found
    lengths = [x.shape[dim] for x, dim in factors]
    # a frozen gate may have closed every row
    wanted = [i for i, x in enumerate(found) if x.numel() and (transform == "dft" or lengths[i] > 1)]
    for places in alike(wanted, lambda i: (lengths[i], found[i].dtype, found[i].device)):
        for group in _chunks(places, [x.numel() for x, _ in factors]):
            dims = tuple(factors[i][1] for i in group)
            folded = _Folded.apply(transform, dims, *(factors[i][0] for i in group))  # type: ignore[no-untyped-call]
            for i, part in zip(group, folded, strict=True):
                found[i] = part
    return found


def _chunks(places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The places in groups of at most ``_TOGETHER`` numbers, at least one place each."""
    groups: list[list[int]] = []
    held = 0
    for place in places:
        if not groups or held + sizes[place] > _TOGETHER:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += sizes[place]
    return groups
