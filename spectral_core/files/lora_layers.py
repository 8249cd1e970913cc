"""One layer of a LoRA file from its tensors, checked: halves, alpha, LyCORIS' kinds, whole differences.

A CP-decomposed convolution (``lora_mid``) is multiplied out, which is exact: downₚ = Σ_q midₚq · down_q.

Shapes: down (r, in, *kernel), up (out, r, *1), mid (r, r, *kernel), alpha a single number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapter.adapter import AdapterLayer, Term
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..methods import LoRAConfig
from . import lycoris
from .lora_alphas import AlphaOf

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Every value of these is one of float16, too.
_FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def build_layer(
    place: str, source: str, parts: Mapping[str, Tensor], alpha_of: AlphaOf | None
) -> AdapterLayer:
    """One layer from its tensors, checked, in their own dtype."""
    for role, value in parts.items():
        is_number = role == "alpha" and not value.is_floating_point() and not value.is_complex()
        if not is_number and (value.dtype not in (*_FLOATS, *_FLOATS_8) or not _is_finite(value)):
            raise SpectralAdapterError(
                f"{place}: {role} ({value.dtype}) holds values that are not finite numbers"
            )
    parts = {k: v.half() if v.dtype in _FLOATS_8 else v for k, v in parts.items()}
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise SpectralAdapterError(
                f"{place}: alpha of shape {tuple(parts['alpha'].shape)}, expected one number"
            )
        alpha = float(parts["alpha"])
    others = sorted(set(parts) & set(lycoris.ROLES))
    if others and {"down", "up"} & set(parts):
        raise SpectralAdapterError(f"{place}: holds a LoRA and {', '.join(others)}; expected one of them")
    if not others:
        return _lora(place, source, parts, alpha, alpha_of)
    return _later(place, parts, alpha)


def _later(place: str, parts: Mapping[str, Tensor], alpha: float | None) -> AdapterLayer:
    """A layer of LyCORIS' kinds: shapes and rank are known without a number multiplied out."""
    told = {role: value.to("meta") for role, value in parts.items()}
    down, up, scale = lycoris.factors(place, told, alpha)
    rank = len(down)
    config = LoRAConfig(rank, None if scale == 1.0 else scale * rank)
    shape = LayerShape(up.shape[0], down.shape[1], tuple(down.shape[2:]))
    return AdapterLayer(shape, (Term(config, lycoris.Factored(place, parts)),))


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.half() if value.dtype in _FLOATS_8 else value).all())


def _lora(
    place: str, source: str, parts: Mapping[str, Tensor], alpha: float | None, alpha_of: AlphaOf | None
) -> AdapterLayer:
    for role in ("down", "up"):
        if role not in parts:
            raise SpectralAdapterError(f"{place}: the {role} projection is missing; the file is damaged")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = _multiplied_out(place, down, parts["mid"])
    rank = down.shape[0] if down.dim() else 0
    is_flat = up.dim() >= 2 and up.numel() == up.shape[0] * up.shape[1]
    if (
        down.dim() < 2
        or down.dim() > 5
        or down.numel() == 0
        or not is_flat
        or up.numel() == 0
        or up.shape[1] != rank
    ):
        raise SpectralAdapterError(
            f"{place}: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit; expected (r, in, …) "
            "and (out, r, 1…)"
        )
    if alpha is None and alpha_of:
        alpha = alpha_of(source, rank)
    return _layer(down, up.reshape(up.shape[0], rank), alpha)


def _layer(down: Tensor, up: Tensor, alpha: float | None) -> AdapterLayer:
    rank = len(down)
    shape = LayerShape(up.shape[0], down.shape[1], tuple(down.shape[2:]))
    config = LoRAConfig(rank, None if alpha is None or alpha == rank else alpha)
    return AdapterLayer(shape, (Term(config, {"down": down.contiguous(), "up": up.contiguous()}),))


def _multiplied_out(place: str, down: Tensor, mid: Tensor) -> Tensor:
    """down (r, in, *kernel) of a CP-decomposed layer: mid (r, q, *kernel) times down (q, in, *1)."""
    is_sound = down.dim() >= 2 and mid.dim() >= 2 and down.numel() == down.shape[0] * down.shape[1]
    if not is_sound or mid.shape[1] != down.shape[0]:
        raise SpectralAdapterError(f"{place}: mid {tuple(mid.shape)} and down {tuple(down.shape)} do not fit")
    dtype = torch.float64 if torch.float64 in (down.dtype, mid.dtype) else torch.float32
    return torch.einsum("pq...,qi->pi...", mid.to(dtype), down.flatten(1).to(dtype))


def layer_of_vector(place: str, difference: Tensor) -> AdapterLayer:
    """A bias's or a norm's difference (n,) as a layer of one column. Raises SpectralAdapterError, beginning
    with ``place``, where it is none."""
    if difference.dim() != 1 or difference.dtype not in (*_FLOATS, *_FLOATS_8) or not _is_finite(difference):
        raise SpectralAdapterError(
            f"{place}: found {difference.dtype} of shape {tuple(difference.shape)}, expected a vector of "
            "finite numbers"
        )
    wide = difference if difference.dtype in _FLOATS else difference.half()
    return _layer(wide.new_ones(1, 1), wide[:, None], None)


def layer_of_difference(place: str, difference: Tensor) -> AdapterLayer:
    """A weight's whole difference (out, in, *kernel) as a layer. Raises SpectralAdapterError, beginning with
    ``place``, where it is none."""
    if not _is_finite(difference):
        raise SpectralAdapterError(f"{place}: its update has values that are not finite numbers")
    down, up, _ = lycoris.factors(place, {"diff": difference}, None)
    return _layer(down, up, None)
