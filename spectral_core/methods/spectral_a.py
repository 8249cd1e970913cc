"""Spectral Adapter, additive: W' = (U₁ + A_U) S₁ (V₁ + A_V)ᵀ + rest.

Source: Zhang & Pilanci, NeurIPS 2024, arXiv 2405.13952.

U₁ S₁ V₁ᵀ are the chosen singular columns of the pretrained weight, kept with the adapter. The delta form
below is W' − W written out, so that nothing cancels and any stored basis gives exactly zero at the start. The
rank is 2r.

Shapes: u (out, r), s (r,), v (fan_in, r) the basis; a_u (out, r), a_v (fan_in, r), optional a_s (r,) trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..maths.layers import LayerShape, as_fp32
from ..maths.lowrank import Factors
from . import common


@dataclass(frozen=True)
class SpectralAConfig(common.MethodConfig):
    """columns: indices of the singular columns, 0 the largest; train_scale adds a trained additive S.

    >>> SpectralAConfig(columns=tuple(range(8))).rank
    8
    """

    method: ClassVar[str] = "spectral_a"
    title: ClassVar[str] = "Spectral Adapter (additive)"
    learning_rate: ClassVar[float] = 1e-3
    columns: tuple[int, ...]
    train_scale: bool = False

    def __post_init__(self) -> None:
        common.check_columns(self.columns, self.method)

    @property
    def rank(self) -> int:
        return len(self.columns)

    @property
    def singular_columns(self) -> tuple[int, ...]:
        return self.columns


def tensor_shapes(config: SpectralAConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    rank = config.rank
    shapes = common.basis_shapes(rank, shape)
    shapes |= {"a_u": (shape.out_features, rank), "a_v": (shape.fan_in, rank)}
    return shapes | ({"a_s": (rank,)} if config.train_scale else {})


def trainable(config: SpectralAConfig) -> tuple[str, ...]:
    return ("a_u", "a_v", "a_s") if config.train_scale else ("a_u", "a_v")


def reach(config: SpectralAConfig, params: Mapping[str, Tensor]) -> dict[str, float]:
    """How far ΔW goes for a step of 1 in a trained tensor: mean(S₁) for A_U and A_V."""
    found = float(as_fp32(params["s"]).mean())
    return {"a_u": found, "a_v": found}


def init(
    config: SpectralAConfig,
    shape: LayerShape,
    basis: tuple[Tensor, Tensor, Tensor] | None,
    generator: Generator | None,
) -> dict[str, Tensor]:
    """The basis, and zeros for everything trained."""
    params = common.basis_params(basis, config.rank, shape, "Spectral A")
    params |= {"a_u": torch.zeros_like(params["u"]), "a_v": torch.zeros_like(params["v"])}
    return params | ({"a_s": torch.zeros_like(params["s"])} if config.train_scale else {})


def fold(
    config: SpectralAConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    """up = [A_U·Sₙ, U₁], down = [(V₁+A_V)ᵀ; (A_V·Sₙ + V₁·C)ᵀ] with Sₙ = S₁ + C, C = a_s or 0.

    Never the difference (V₁+A_V)·Sₙ − V₁·S₁: it cancels (65 % error in bfloat16 at |A| = 1e-5).
    """
    u, s, v, a_u, a_v = (as_fp32(params[name]) for name in ("u", "s", "v", "a_u", "a_v"))
    if config.train_scale:
        c = as_fp32(params["a_s"])
        s = s + c
        second = a_v * s + v * c
    else:
        second = a_v * s
    down = torch.cat([v + a_v, second], 1).mT.reshape(-1, shape.in_features, *shape.kernel)
    return Factors(down, torch.cat([a_u * s, u], 1), strength)
