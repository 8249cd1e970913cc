"""Orthogonal Adaptation: a LoRA whose rows are drawn once from shared orthogonal rows and stay fixed.

Source: Po, Yang, Aberman & Wetzstein, CVPR 2024, arXiv 2312.02432. ΔW = (alpha / rank) · up · down, only
``up`` is trained. Every concept takes its own ``block`` of the same orthogonal matrix O of the layer's width,
so the rows of two concepts are orthogonal exactly, whoever trains them where; with equal blocks (as in the
baseline released with Spectral Adapter, one seed for all) they would coincide instead.

O is the DCT-II matrix with its columns' signs flipped and its rows shuffled, both from ``seed``: orthonormal
by construction, and any of its rows can be had without the others. NumPy's RandomState is frozen, which
adapters trained in different places depend on.

Shapes: down (rank, in, *kernel) stored, up (out, rank) trained; O (fan_in, fan_in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape, as_fp32
from ..maths.lowrank import Factors
from . import common


@dataclass(frozen=True)
class OrthogonalConfig(common.MethodConfig):
    """rank ≥ 1; alpha None means alpha = rank; block k: rows [k·rank, (k+1)·rank) of the O of ``seed``.

    >>> OrthogonalConfig(rank=4, block=2).scale
    1.0
    """

    method: ClassVar[str] = "orthogonal"
    title: ClassVar[str] = "Orthogonal Adaptation"
    rank: int
    alpha: float | None = None
    block: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        common.check_rank(self.rank, self.method)
        common.check_alpha(self.alpha, self.method)
        for name, top in (("block", 2**31), ("seed", 2**32)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < top:
                raise SpectralAdapterError(
                    f"{name} {value!r} for method {self.method}: expected a whole number of at least 0"
                )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def orthogonal_rows(fan_in: int, start: int, stop: int, seed: int) -> Tensor:
    """Rows start … stop−1 of O (fan_in, fan_in), float64: a function of the arguments alone."""
    random = np.random.RandomState(seed)
    order = random.permutation(fan_in)[start:stop]
    signs = torch.from_numpy(2.0 * random.randint(0, 2, fan_in) - 1.0)
    k = torch.from_numpy(order).double()[:, None]
    j = torch.arange(fan_in, dtype=torch.float64)[None, :]
    rows = torch.cos(math.pi * (2 * j + 1) * k / (2 * fan_in)) * math.sqrt(2 / fan_in)
    return torch.where(k == 0, rows / math.sqrt(2), rows) * signs


def tensor_shapes(config: OrthogonalConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    return {"down": (config.rank, shape.in_features, *shape.kernel), "up": (shape.out_features, config.rank)}


def trainable(config: OrthogonalConfig) -> tuple[str, ...]:
    return ("up",)


def init(
    config: OrthogonalConfig, shape: LayerShape, basis: object, generator: Generator | None
) -> dict[str, Tensor]:
    """down the block's rows, up zero; refused where the layer is too narrow for the block."""
    start, stop = config.block * config.rank, (config.block + 1) * config.rank
    if stop > shape.fan_in:
        raise SpectralAdapterError(
            f"block {config.block} of {config.rank} orthogonal rows in a layer of fan-in {shape.fan_in}: it "
            f"has room for {shape.fan_in // config.rank} blocks; use a smaller rank or leave the layer out"
        )
    rows = orthogonal_rows(shape.fan_in, start, stop, config.seed).float()
    down = rows.reshape(config.rank, shape.in_features, *shape.kernel)
    return {"down": down, "up": torch.zeros(shape.out_features, config.rank)}


def fold(
    config: OrthogonalConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    return Factors(as_fp32(params["down"]), as_fp32(params["up"]), config.scale * strength)
