"""Hard gates of several layers that see one input, in few operations: constants are worked out beforehand.

With W₁ = [W, w], w the column of the level, what :func:`..gates.formula.logits` says is the same as

    W·LayerNorm(φ) + (w·1ᵀ/rank)·φ + (b₁ − w·μ)

in the hidden layer. A gate is arithmetic on a handful of numbers and a model has hundreds of gates, so what
it costs is the number of operations. Gates of the kind ``mlp`` only; no gradients.

Shapes: z (B, T, n·R) for n layers of R rows; open (n, B, R); W₁ (hidden, R + 1), W₂ (R, hidden).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gates.formula import FLOOR
from ..maths.layers import as_fp32
from ..maths.precision import full_precision

KIND = "mlp"


@dataclass(frozen=True, eq=False)
class FoldedGates:
    """n gates of one rank in float32, on the device of z.

    first (n, R, hidden), level (n, R, hidden) and bias (n, 1, hidden) give the hidden layer, second (n,
    hidden, R) and second_bias (n, 1, R) the logits.
    """

    first: Tensor
    level: Tensor
    bias: Tensor
    second: Tensor
    second_bias: Tensor
    floor: Tensor

    @classmethod
    def of(cls, gates: Sequence[Mapping[str, Tensor]]) -> FoldedGates:
        """Of each layer's gate tensors (:func:`..gates.formula.tensor_shapes`)."""

        def stacked(name: str) -> Tensor:
            return torch.stack([as_fp32(gate[f"gate.{name}"]) for gate in gates])

        w1, mu = stacked("w1").mT, stacked("mu")[:, None, None]
        first, level = w1[:, :-1].contiguous(), w1[:, -1:]
        return cls(
            first,
            (level / first.shape[1]).expand_as(first).contiguous(),
            stacked("b1")[:, None] - level * mu,
            stacked("w2").mT.contiguous(),
            stacked("bias")[:, None],
            torch.full((), FLOOR, device=first.device),
        )

    def open(self, z: Tensor) -> Tensor:
        """Which rows are open, (n, B, R) bool."""
        energy = as_fp32(z).square().sum(1)
        phi = torch.add(self.floor, energy, alpha=1 / z.shape[1]).log_()
        phi = phi.unflatten(1, self.second_bias.shape[::2]).transpose(0, 1)
        with full_precision(phi.device):  # a product in half precision would move the threshold
            hidden = torch.baddbmm(self.bias, phi, self.level)
            hidden.baddbmm_(F.layer_norm(phi, phi.shape[-1:]), self.first)
            return torch.baddbmm(self.second_bias, F.silu(hidden, inplace=True), self.second) > 0
