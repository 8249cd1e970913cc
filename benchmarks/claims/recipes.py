"""The methods as the claims compare them. Equal budgets: LoRA and FouRA of rank 8 and Spectral A of 8
columns train the same number of parameters in every layer (but for FouRA's gates).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.claims.lab import Recipe
from spectral_core.methods import (
    FouRAConfig,
    LoRAConfig,
    MethodConfig,
    OrthogonalConfig,
    SpectralAConfig,
    SpectralRConfig,
)

RANK = 8
TRANSFORMS = ("none", "dct", "dft")


def _singular_values(weight: Tensor) -> int:
    """How many a weight (out, in, *kernel) has."""
    flat = weight.flatten(1)
    return min(flat.shape)


def _columns(place: str) -> Callable[[Tensor], MethodConfig]:
    def configure(weight: Tensor) -> MethodConfig:
        count = _singular_values(weight)
        first = {"top": 0, "middle": (count - RANK) // 2, "bottom": count - RANK}.get(place)
        if first is not None:
            return SpectralAConfig(tuple(range(first, first + RANK)))
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:RANK]
        return SpectralAConfig(tuple(sorted(chosen.tolist())))

    return configure


def block(place: int) -> Recipe:
    """Spectral A in the concept's own block of columns."""
    columns = tuple(range(place * RANK, (place + 1) * RANK))
    return Recipe(f"spectral_a block {place}", lambda _: SpectralAConfig(columns), 3e-3)


def orthogonal(place: int) -> Recipe:
    """Orthogonal Adaptation with the concept's own rows."""
    return Recipe(f"orthogonal block {place}", lambda _: OrthogonalConfig(RANK, block=place), 3e-3)


def lora(rank: int) -> Recipe:
    return Recipe("lora" if rank == RANK else f"lora rank {rank}", lambda _: LoRAConfig(rank), 3e-3)


def rotation(rank: int) -> Recipe:
    """Spectral R with its trained scale, as the paper counts it."""
    columns = tuple(range(rank))
    return Recipe(f"spectral_r {rank}", lambda _: SpectralRConfig(columns, train_scale=True), 1e-2)


def foura(transform: str, gate: str, rank: int = RANK) -> Recipe:
    """At the rate of its own sweep, with and without its gate."""
    name = f"foura {transform} {gate}" + ("" if rank == RANK else f" rank {rank}")
    return Recipe(name, lambda _: FouRAConfig(rank, transform=transform, gate=gate), 3e-3)


ABLATION: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        lora(RANK),
        *(foura(transform, "adaptive") for transform in TRANSFORMS),
        foura("dct", "none"),
    ]
}
COLUMNS: Mapping[str, Recipe] = {
    place: Recipe(f"spectral_a {place}", _columns(place), 3e-3)
    for place in ("top", "bottom", "middle", "random")
}
