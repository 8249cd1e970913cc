"""LoHa, LoKr and full differences as the two factors that everything here computes with, exactly.

LoHa   ΔW = (w1_a w1_b) ∘ (w2_a w2_b): column (i, j) of ``up`` is w1_aᵢ ∘ w2_aⱼ, and so for the rows of
       ``down``: rank r² (arXiv 2108.06098, proposition 1).
LoKr   ΔW = w1 ⊗ w2: the factors of a Kronecker product are the Kronecker products of the factors
       (arXiv 2309.14859, section 3).
Where such a rank is no smaller than the weight's own the update is kept whole, with an identity beside it.

Shapes: down (R, in, *kernel) and up (out, R) in float32; a kernel that the file has flattened stays flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from ..maths.layers import as_fp32

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ROLES = (*LOHA, *LOKR, "diff")
MAX_NUMBERS = 1 << 28  # of one layer's factors, 1 GiB: more than the largest layer in circulation takes


def factors(place: str, parts: Mapping[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor, float]:
    """(down, up, scale) with ΔW = scale · up · down.

    parts: a layer's tensors by role. alpha: over the file's own rank; without one the scale is 1. Raises
    SpectralAdapterError, which begins with ``place``, for missing halves and shapes that do not fit.
    """
    parts = {role: as_fp32(value) for role, value in parts.items() if role in ROLES}
    try:
        if "diff" in parts:
            return *_whole(parts["diff"], place), 1.0
        down, up, rank = _loha(parts, place) if "hada_w1_a" in parts else _lokr(parts, place)
    except KeyError as missing:
        raise SpectralAdapterError(f"{place}: tensor {missing} is missing; the file is damaged") from missing
    except (RuntimeError, IndexError, TypeError) as error:  # TypeError: the length of a single number
        shapes = ", ".join(f"{role} {tuple(value.shape)}" for role, value in parts.items())
        raise SpectralAdapterError(f"{place}: the shapes do not fit each other: {shapes}") from error
    return down, up, 1.0 if alpha is None or rank is None else alpha / rank


class Factored(Mapping[str, Tensor]):
    """``down`` and ``up`` of a layer, multiplied out each time they are asked for, so that a file takes the
    memory of its own tensors and of one layer's product. A file of kilobytes may describe a whole model."""

    is_immutable = True  # :class:`..adapter.adapter.Term` keeps it instead of a copy

    def __init__(self, place: str, parts: Mapping[str, Tensor]) -> None:
        self._place, self._parts = place, dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        with torch.inference_mode(False), torch.no_grad():
            down, up, _ = factors(self._place, self._parts, None)
            return (down if name == "down" else up).contiguous()

    def __contains__(self, name: object) -> bool:  # without multiplying
        return name in ("down", "up")

    def __iter__(self) -> Iterator[str]:
        return iter(("down", "up"))

    def __len__(self) -> int:
        return 2


def _loha(parts: Mapping[str, Tensor], place: str) -> tuple[Tensor, Tensor, int | None]:
    a1, b1, a2, b2 = (parts[role] for role in LOHA[:4])
    rank = b1.shape[0]
    if "hada_t1" in parts or "hada_t2" in parts:
        product = _tucker(parts["hada_t1"], a1, b1) * _tucker(parts["hada_t2"], a2, b2)
        return *_whole(product, place), rank
    _need(all(each.dim() == 2 for each in (a1, b1, a2, b2)))
    _need(a1.shape[1] == len(b1) and a2.shape[1] == len(b2) and len(a1) == len(a2))
    _need(b1.shape[1] == b2.shape[1])
    out, fan_in = a1.shape[0], b1.shape[1]
    _bounded(max(out * fan_in, out * rank**2, fan_in * rank**2), place)
    if rank * a2.shape[1] >= min(out, fan_in):
        return *_whole((a1 @ b1) * (a2 @ b2), place), rank
    up = (a1[:, :, None] * a2[:, None, :]).reshape(out, -1)
    down = (b1[:, None, :] * b2[None, :, :]).reshape(-1, fan_in)
    return down, up, rank


def _lokr(parts: Mapping[str, Tensor], place: str) -> tuple[Tensor, Tensor, int | None]:
    (down1, up1), rank1 = _side(parts, "lokr_w1", place)
    (down2, up2), rank2 = _side(parts, "lokr_w2", place)
    out, fan_in = len(up1) * len(up2), down1.shape[1] * down2[0].numel()
    _bounded(max(out, fan_in) * min(out, fan_in, len(down1) * len(down2)), place)
    rank = rank1 if rank2 is None else rank2  # both apart: the second's, as the readers in use have it
    if len(down1) * len(down2) >= min(out, fan_in):
        whole = torch.kron(up1 @ down1, up2 @ down2.flatten(1))
        return *_whole(whole.reshape(out, down1.shape[1] * down2.shape[1], *down2.shape[2:]), place), rank
    down = torch.kron(down1, down2.flatten(1))
    down = down.reshape(len(down), down1.shape[1] * down2.shape[1], *down2.shape[2:])
    return down, torch.kron(up1, up2), rank


def _side(parts: Mapping[str, Tensor], role: str, place: str) -> tuple[tuple[Tensor, Tensor], int | None]:
    """(down, up) of one side of the product, and its rank where it is in two parts."""
    if role in parts:
        return _whole(parts[role], place), None
    a, b = parts[f"{role}_a"], parts[f"{role}_b"]
    if "lokr_t2" in parts and role == "lokr_w2":
        return _whole(_tucker(parts["lokr_t2"], a, b), place), b.shape[0]
    _need(a.dim() == 2 and a.shape[1] == len(b))
    return (b, a), b.shape[0]


def _tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(out, in, *kernel) of t (r, q, *kernel), a (r, out) and b (q, in)."""
    _bounded(a.shape[1] * b.shape[1] * math.prod(t.shape[2:]), "a layer")
    return torch.einsum("ij...,jr,ip->pr...", t, b, a)


def _whole(difference: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """(down, up) of a weight's difference (out, in, *kernel), one of them an identity."""
    if difference.dim() < 2 or difference.numel() == 0:
        raise SpectralAdapterError(
            f"{place}: a difference of shape {tuple(difference.shape)}: expected (out, in, …)"
        )
    out, fan_in = difference.shape[0], difference[0].numel()
    _bounded(max(out, fan_in) * min(out, fan_in), place)
    if out <= fan_in:
        return difference, torch.eye(out, dtype=difference.dtype, device=difference.device)
    return torch.eye(fan_in, dtype=difference.dtype, device=difference.device).reshape(
        fan_in, *difference.shape[1:]
    ), difference.flatten(1)


def _need(fits: bool) -> None:
    if not fits:
        raise IndexError  # told with all shapes by :func:`factors`


def _bounded(numbers: int, place: str) -> None:
    """Before anything is allocated."""
    if numbers > MAX_NUMBERS:
        raise SpectralAdapterError(
            f"{place}: its update has {numbers} numbers, more than {MAX_NUMBERS}; no layer is so large"
        )
