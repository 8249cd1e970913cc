"""Plain LoRA: ΔW = (alpha / rank) · up · down (Hu et al., ICLR 2022, arXiv 2106.09685).

The control for the other methods, and the form in which ordinary LoRA files and fused adapters live here.

Shapes: down (rank, in, *kernel), up (out, rank).
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
class LoRAConfig(common.MethodConfig):
    """rank ≥ 1; alpha None means alpha = rank, a scale of 1.

    >>> LoRAConfig(rank=8, alpha=4).scale
    0.5
    """

    method: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        common.check_rank(self.rank, self.method)
        common.check_alpha(self.alpha, self.method)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def tensor_shapes(config: LoRAConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    return {"down": (config.rank, shape.in_features, *shape.kernel), "up": (shape.out_features, config.rank)}


def trainable(config: LoRAConfig) -> tuple[str, ...]:
    return ("down", "up")


def init(
    config: LoRAConfig, shape: LayerShape, basis: object, generator: Generator | None
) -> dict[str, Tensor]:
    """down Kaiming-uniform, up zero."""
    return {
        "down": common.kaiming_down(config.rank, shape, generator),
        "up": torch.zeros(shape.out_features, config.rank),
    }


def fold(
    config: LoRAConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    return Factors(as_fp32(params["down"]), as_fp32(params["up"]), config.scale * strength)
