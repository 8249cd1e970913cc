"""Spectral Adapter, rotational: W' = (U₁R_U) S₁ (V₁R_V)ᵀ + rest, R = (I+Q)(I−Q)⁻¹ (arXiv 2405.13952).

Q is skew, so R is orthogonal (Cayley); a layer's trained part is two r×r skew matrices, a few hundred
numbers. With K = R − I, ΔW = U₁ (K_U S₁ + S₁ K_Vᵀ + K_U S₁ K_Vᵀ) V₁ᵀ: exact at small angles, rank ≤ r.

Shapes: u (out, r), s (r,), v (fan_in, r) the basis; q_u, q_v (r(r−1)/2,) the entries of Q above the diagonal;
optional s_scale (r,): the singular values become S₁·(1 + s_scale).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from ..maths.cayley import cayley_minus_identity
from ..maths.layers import LayerShape, as_fp32
from ..maths.lowrank import Factors
from ..maths.precision import full_precision
from . import common

StrengthLaw = Literal["delta", "rotation"]
STRENGTH_LAWS: tuple[StrengthLaw, ...] = get_args(StrengthLaw)


@dataclass(frozen=True)
class SpectralRConfig(common.MethodConfig):
    """columns: indices of the singular columns, 0 the largest; train_scale trains the singular values too.

    strength_law ``delta`` scales ΔW, as every method does. ``rotation`` scales the angles instead,
    Cayley(s·Q): it stays orthogonal, but is neither linear nor monotone in s, and an exported LoRA follows it
    at one strength only.

    >>> SpectralRConfig(columns=(0, 1, 2)).is_linear
    True
    """

    method: ClassVar[str] = "spectral_r"
    title: ClassVar[str] = "Spectral Adapter (rotational)"
    learning_rate: ClassVar[float] = 1e-2
    columns: tuple[int, ...]
    train_scale: bool = False
    strength_law: StrengthLaw = "delta"

    def __post_init__(self) -> None:
        common.check_columns(self.columns, self.method)
        common.check_choice(self.strength_law, STRENGTH_LAWS, "strength_law", self.method)

    @property
    def rank(self) -> int:
        return len(self.columns)

    @property
    def singular_columns(self) -> tuple[int, ...]:
        return self.columns

    @property
    def is_linear(self) -> bool:
        return self.strength_law == "delta"


def tensor_shapes(config: SpectralRConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    rank = config.rank
    entries = rank * (rank - 1) // 2
    shapes = common.basis_shapes(rank, shape)
    shapes |= {"q_u": (entries,), "q_v": (entries,)}
    return shapes | ({"s_scale": (rank,)} if config.train_scale else {})


def trainable(config: SpectralRConfig) -> tuple[str, ...]:
    return ("q_u", "q_v", "s_scale") if config.train_scale else ("q_u", "q_v")


def init(
    config: SpectralRConfig,
    shape: LayerShape,
    basis: tuple[Tensor, Tensor, Tensor] | None,
    generator: Generator | None,
) -> dict[str, Tensor]:
    """The basis, and zeros for everything trained: R = I."""
    params = common.basis_params(basis, config.rank, shape, "Spectral R")
    entries = config.rank * (config.rank - 1) // 2
    params |= {"q_u": torch.zeros(entries), "q_v": torch.zeros(entries)}
    return params | ({"s_scale": torch.zeros_like(params["s"])} if config.train_scale else {})


def fold(
    config: SpectralRConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    """up = U₁·M, down = V₁ᵀ with M = (S − S₁) + K_U S + S K_Vᵀ + K_U S K_Vᵀ, S = S₁·(1 + s_scale)."""
    return fold_many([common.Fold(config, shape, params, strength)])[0]


def fold_many(folds: Sequence[common.Fold]) -> list[Factors]:
    """:func:`fold` of many layers: those of one rank are rotated together."""

    names = ("s", "q_u", "q_v", "s_scale")

    def alike(each: common.Fold) -> Hashable:
        angle = each.strength if each.config.strength_law == "rotation" else 1.0
        kinds = (each.params[name] for name in names if name in each.params)
        return each.config.rank, each.config.train_scale, angle, *((p.device, p.dtype) for p in kinds)

    return common.together(folds, alike, _fold_alike)


def _fold_alike(folds: Sequence[common.Fold]) -> list[Factors]:
    config, rotates = folds[0].config, folds[0].config.strength_law == "rotation"
    angle = folds[0].strength if rotates else 1.0

    given = [folds[0].params[name] for name in ("s", "q_u", "q_v", "s_scale") if name in folds[0].params]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32

    def stacked(*names: str) -> Tensor:
        return torch.stack([fold.params[name].to(dtype) for name in names for fold in folds])

    s, q = stacked("s"), stacked("q_u", "q_v")
    k_u, k_v = cayley_minus_identity(q if angle == 1 else q * angle, config.rank).chunk(2)
    change = None
    if config.train_scale:
        change = s * stacked("s_scale") * angle
        s = s + change
    turned = k_u * s[:, None]
    with full_precision(s.device):
        core = turned + s[:, :, None] * k_v.mT + turned @ k_v.mT
        core = core if change is None else core + torch.diag_embed(change)
        ups = [
            _times(as_fp32(fold.params["u"]), each) for fold, each in zip(folds, core.unbind(), strict=True)
        ]
    found = []
    for fold, up in zip(folds, ups, strict=True):
        down = as_fp32(fold.params["v"]).mT.reshape(-1, fold.shape.in_features, *fold.shape.kernel)
        found.append(Factors(down, up, 1.0 if rotates else fold.strength))
    return found


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a · b, of different precisions in the better one."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)
