"""The numbers of a fusion that have a good default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SpectralAdapterError


@dataclass(frozen=True)
class FusionOptions:
    """ridge: ρ of ``closed-form``; rank_ridge: of ``closed-form-rank``; subspace_ridge: of ``subspaces``.

    All three are shares of the mean second moment; at 0, directions that no concept has shown stay at 0.
    exact_from: tokens of every concept, per width of a layer, from which ``closed-form`` takes its exact form
    and not the one in rank space. 0, always, as far as the statistics allow it: with its ridge the exact form
    was the better one on held-out inputs also with fewer tokens than features (docs/fusion.md).

    base_weight: how much keeping the base model's behaviour counts beside one concept, where its statistics
    are given. iterations: of ``gradient``. separate_columns: before fusing, take out of every Spectral A
    update what lies in other concepts' columns.
    """

    ridge: float = 0.1
    rank_ridge: float = 1e-3
    subspace_ridge: float = 1.0
    exact_from: float = 0.0
    base_weight: float = 1.0
    iterations: int = 50
    separate_columns: bool = False

    def __post_init__(self) -> None:
        for name in ("ridge", "rank_ridge", "subspace_ridge", "exact_from", "base_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise SpectralAdapterError(f"{name} {value!r}: expected a number of at least 0")
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise SpectralAdapterError(
                f"iterations {self.iterations!r}: expected a whole number of at least 1"
            )
