"""What the method files share: checks of their configurations' numbers, and how their tensors start.

Shapes: u (out, r), s (r,), v (fan_in, r) a basis; down (rank, in, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import SpectralAdapterError
from ..maths.grouping import alike
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors
from ..words import expected

MOST_RANK = 65_536  # more than the smaller side of any layer that there is


class AdaptiveGate(NamedTuple):
    """A gate that the layer's input opens and closes: its kind, its rows of z, the share of gates that is
    open for every input or 0 (:mod:`..gates.formula`)."""

    kind: str
    rows_per_gate: int
    budget: float = 0.0


class MethodConfig:
    """What others ask of a configuration, with the answers of a plain low-rank method."""

    method: ClassVar[str]  # in files and commands
    title: ClassVar[str]  # for people
    learning_rate: ClassVar[float] = 1e-4  # AdamW's to begin with, for models of Stable Diffusion's size
    if TYPE_CHECKING:  # a real property would become the default of the field in a subclass

        @property
        def rank(self) -> int: ...

        __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scale(self) -> float:
        """The factor of ΔW besides the strength: alpha / rank."""
        return 1.0

    @property
    def is_linear(self) -> bool:
        """Whether ΔW is proportional to the strength."""
        return True

    @property
    def adaptive_gate(self) -> AdaptiveGate | None:
        """The gate between both factors, which no fixed weight can stand for; None without one."""
        return None

    @property
    def singular_columns(self) -> tuple[int, ...]:
        """The pretrained weight's singular columns that are changed, 0 the largest; none by default."""
        return ()

    @property
    def summary(self) -> str:
        """The configuration in a few words."""
        columns = self.singular_columns
        size = f"{len(columns)} columns from {min(columns)}" if columns else f"rank {self.rank}"
        return f"{self.method}, {size}"


class Fold(NamedTuple):
    """What ``fold`` takes, for one layer."""

    config: Any
    shape: LayerShape
    params: Mapping[str, Tensor]
    strength: float = 1.0


FoldMany = Callable[[Sequence[Fold]], list[Factors]]


def one_by_one(fold: Callable[..., Factors]) -> FoldMany:
    """``fold_many`` of a method whose fold is so short that there is nothing to share."""
    return lambda folds: [fold(*each) for each in folds]


def together(folds: Sequence[Fold], key: Callable[[Fold], Hashable], fold_alike: FoldMany) -> list[Factors]:
    """The factors of every fold in its place, computed by those groups that ``key`` makes."""
    found: dict[int, Factors] = {}
    for group in alike(range(len(folds)), lambda i: key(folds[i])):
        found.update(zip(group, fold_alike([folds[i] for i in group]), strict=True))
    return [found[i] for i in range(len(folds))]


def check_rank(rank: object, method: str) -> None:
    """Refuse a rank that is not a positive whole number."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MOST_RANK:
        raise SpectralAdapterError(
            f"rank {rank!r:.40} for method {method}: expected a whole number from 1 to {MOST_RANK}"
        )


def check_alpha(alpha: object, method: str) -> None:
    """Refuse an alpha that is neither None nor a finite number."""
    if alpha is None:
        return
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise SpectralAdapterError(
            f"alpha {alpha!r} for method {method}: expected a finite number or nothing"
        )


def check_choice(value: object, choices: tuple[str, ...], setting: str, method: str) -> None:
    """Refuse a value that is not among the choices, with the nearest one."""
    if value not in choices:
        raise SpectralAdapterError(f"{setting} {value!r} for method {method}: {expected(value, choices)}")


def check_share(value: object, setting: str, method: str) -> None:
    """Refuse what is not a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SpectralAdapterError(
            f"{setting} {value!r:.40} for method {method}: expected a number from 0 to 1"
        )


def check_columns(columns: object, method: str) -> None:
    """Refuse columns that are not a non-empty list of distinct indices ≥ 0."""
    found = columns if isinstance(columns, tuple) else ()
    whole = all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c < MOST_RANK for c in found)
    if not found or not whole or len(set(found)) != len(found):
        raise SpectralAdapterError(
            f"columns {columns!r:.200} for method {method}: expected distinct indices of singular columns, "
            f"0 (that of the largest singular value) to {MOST_RANK - 1}"
        )


def kaiming_down(rank: int, shape: LayerShape, generator: Generator | None) -> Tensor:
    """down (rank, in, *kernel) ~ U(−b, b), b = fan_in^-½: Kaiming-uniform with a = √5, as LoRA starts."""
    bound = 1 / math.sqrt(shape.fan_in)
    down = torch.empty(rank, shape.in_features, *shape.kernel)
    return down.uniform_(-bound, bound, generator=generator)


def basis_shapes(rank: int, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """The stored singular columns of a spectral method."""
    return {"u": (shape.out_features, rank), "s": (rank,), "v": (shape.fan_in, rank)}


def basis_params(
    basis: tuple[Tensor, Tensor, Tensor] | None, rank: int, shape: LayerShape, name: str
) -> dict[str, Tensor]:
    """The basis as it is stored, in float32; refused without one, or with one of other shapes."""
    if basis is None:
        raise SpectralAdapterError(
            f"{name} needs the singular columns of the pretrained weight to start from"
        )
    u, s, v = (t.detach().float().contiguous() for t in basis)
    params = {"u": u, "s": s, "v": v}
    for key, wanted in basis_shapes(rank, shape).items():
        if params[key].shape != wanted:
            raise SpectralAdapterError(
                f"{name}: the basis has {key} of shape {tuple(params[key].shape)}, expected {wanted} for "
                f"{rank} columns; a layer smaller than that has not so many"
            )
    return params
