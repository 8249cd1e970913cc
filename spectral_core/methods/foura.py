"""FouRA: ΔW·x = F⁻¹( B · α · G(z) · z ), z = A·F(x) (Borse et al., NeurIPS 2024, arXiv 2406.08798).

A and B are real and live in frequency space; the transform folds into them (:mod:`..maths.transforms`), so
the forward path is two plain products around the gate. ``dct`` folds to rank r, ``dft`` to 2r (real and
imaginary rows, which share one gate each pair), ``none`` is the gated LoRA control. Convolutions: the channel
axis only.

A frozen gate keeps its open rows and drops the others: the result is an ordinary low-rank update.

Shapes: a (rank, in, *kernel), b (out, rank); gate tensors in :mod:`..gates.formula`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from ..gates import formula as gates
from ..maths import transforms
from ..maths.layers import LayerShape, as_fp32
from ..maths.lowrank import Factors
from . import common

Gate = Literal["none", "adaptive", "frozen"]
GATES: tuple[Gate, ...] = get_args(Gate)


@dataclass(frozen=True)
class FouRAConfig(common.MethodConfig):
    """rank ≥ 1; alpha None means alpha = rank; transform dct / dft / none; gate none / adaptive / frozen.

    gate_kind ``mlp`` is the gate of this project, ``entropy`` the one nearest to the formula as printed.
    gate_budget 0 … 1: the share of gates that is open for every input; 0: whichever decide to.

    >>> FouRAConfig(rank=8, gate="none").scale
    1.0
    """

    method: ClassVar[str] = "foura"
    title: ClassVar[str] = "FouRA"
    rank: int
    alpha: float | None = None
    transform: transforms.Transform = "dct"
    gate: Gate = "adaptive"
    gate_kind: gates.Kind = "mlp"
    gate_budget: float = field(default=0.0, metadata={"later": True})

    def __post_init__(self) -> None:
        common.check_rank(self.rank, self.method)
        common.check_alpha(self.alpha, self.method)
        common.check_choice(self.transform, transforms.TRANSFORMS, "transform", self.method)
        common.check_choice(self.gate, GATES, "gate", self.method)
        common.check_choice(self.gate_kind, gates.KINDS, "gate_kind", self.method)
        common.check_share(self.gate_budget, "gate_budget", self.method)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def adaptive_gate(self) -> common.AdaptiveGate | None:
        if self.gate != "adaptive":
            return None
        return common.AdaptiveGate(self.gate_kind, self.rows_per_gate, self.gate_budget)

    @property
    def summary(self) -> str:
        gate = "no gate" if self.gate == "none" else f"{self.gate} gate"
        return f"{self.method} {self.transform}, {gate}, rank {self.rank}"

    @property
    def rows_per_gate(self) -> int:
        """2 for ``dft``, whose real and imaginary rows share a gate, else 1."""
        return 2 if self.transform == "dft" else 1


def tensor_shapes(config: FouRAConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    shapes = {"a": (config.rank, shape.in_features, *shape.kernel), "b": (shape.out_features, config.rank)}
    if config.gate == "adaptive":
        shapes |= gates.tensor_shapes(config.rank, config.gate_kind)
    if config.gate == "frozen":
        shapes["gate.mask"] = (config.rank,)
    return shapes


def trainable(config: FouRAConfig) -> tuple[str, ...]:
    return ("a", "b", *(gates.trainable(config.gate_kind) if config.gate == "adaptive" else ()))


def init(
    config: FouRAConfig, shape: LayerShape, basis: object, generator: Generator | None
) -> dict[str, Tensor]:
    """a Kaiming-uniform, b zero; the gate open (bias +2), a frozen one with every row open."""
    params = {
        "a": common.kaiming_down(config.rank, shape, generator),
        "b": torch.zeros(shape.out_features, config.rank),
    }
    if config.gate == "adaptive":
        params |= gates.init(config.rank, config.gate_kind, generator)
    if config.gate == "frozen":
        params["gate.mask"] = torch.ones(config.rank)
    return params


def fold(
    config: FouRAConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    """down = A·F, up = F⁻¹·B: with a frozen gate the open rows only, with an adaptive one all."""
    return fold_many([common.Fold(config, shape, params, strength)])[0]


def fold_many(folds: Sequence[common.Fold]) -> list[Factors]:
    """:func:`fold` of many layers, their transforms together."""
    return common.together(folds, lambda each: each.config.transform, _fold_alike)


def _fold_alike(folds: Sequence[common.Fold]) -> list[Factors]:
    wanted = []
    for config, _, params, _ in folds:
        a, b = as_fp32(params["a"]), as_fp32(params["b"])
        if config.gate == "frozen":
            is_open = params["gate.mask"] > 0.5
            a, b = a[is_open], b[:, is_open]
        wanted += [(a, 1), (b, 0)]
    folded = transforms.fold_many(wanted, folds[0].config.transform)
    each = zip(folds, folded[::2], folded[1::2], strict=True)
    return [Factors(down, up, fold.config.scale * fold.strength) for fold, down, up in each]


def freeze(config: FouRAConfig, params: Mapping[str, Tensor]) -> tuple[FouRAConfig, dict[str, Tensor]]:
    """The adapter with its gate frozen to the rows that were open on average (:func:`..formula.freeze` of
    ``gate.mean_open``).

    Other configurations come back as they are. The rank stays; ``fold`` leaves the closed rows out.
    """
    if config.gate != "adaptive":
        return config, dict(params)
    kept = {name: params[name] for name in ("a", "b")}
    mask = gates.freeze(params["gate.mean_open"], config.gate_budget)
    return replace(config, gate="frozen", gate_budget=0.0), kept | {"gate.mask": mask}
