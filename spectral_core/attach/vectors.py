"""Updates of a module's vectors: a bias, or the weight of a norm.

LoRA files may hold such differences beside their matrices. Each is a layer of its own here, named after the
parameter, with ΔW of one column; so strengths, schedules, fusion and files treat it as any other:

    bias     y + strength · Δb
    weight   y + strength · Δw ∘ x̂,  x̂ the norm of x without weight and bias

Shapes: ΔW (n, 1); y (…, n) or, of a convolution or group norm, (B, n, *space).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maths.layers import as_fp32
from .update import LayerUpdate


def vector_problem(module: nn.Module, parameter: str, live: bool) -> str | None:
    """Why a module's vector cannot take an update, or None; live: its forward cannot."""
    found = getattr(module, parameter, None)
    if not isinstance(found, Tensor):
        return f"this {type(module).__name__} has no {parameter}"
    if found.dim() != 1:
        return f"its {parameter} has {found.dim()} dimensions; expected a vector"
    if live and parameter == "weight" and _kind(module) is None:
        return f"{type(module).__name__} is no layer, group or RMS norm that is known here; merge the adapter"
    return None


def _kind(module: nn.Module) -> str | None:
    """group, layer or rms; told by attributes and name, because hosts and libraries bring their own."""
    if hasattr(module, "num_groups"):
        return "group"
    if "rms" in type(module).__name__.lower():
        return "rms"
    return "layer" if hasattr(module, "normalized_shape") else None


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """x̂: what the norm gives with weight 1 and bias 0."""
    kind = _kind(module)
    if kind == "group":
        return F.group_norm(x, module.num_groups, None, None, module.eps)  # type: ignore[arg-type]
    if kind == "layer":
        return F.layer_norm(x, tuple(module.normalized_shape), None, None, module.eps)  # type: ignore[arg-type]
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    wide = as_fp32(x)
    mean = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))).to(x.dtype)


class VectorUpdate(LayerUpdate):
    """One adapter's update of one vector, as the module's dispatcher adds it to the module's output."""

    module: nn.Module

    def add(self, x: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """y + strength · Δb, or y + strength · Δw ∘ x̂, a new tensor in y's dtype."""
        strength = self._strength_now()
        if not isinstance(strength, Tensor) and strength == 0:
            return y
        name = self.name.vector
        assert name is not None
        axis = -1
        if hasattr(self.module, "kernel_size"):
            axis = y.dim() - 1 - len(self.module.kernel_size)  # type: ignore[arg-type]
        elif _kind(self.module) == "group":
            axis = 1
        column = [1] * y.dim()
        column[axis] = -1
        target = y if self.name.rows is None else _rows(y, axis, self.name.rows)
        total: Tensor | None = None
        for piece in self.pieces:
            scale, rows, folded = self._split(strength, piece)
            down, up, _ = piece.ready(y.device, self._dtype_for(x), folded)
            change = (up @ down).mul(scale).reshape(column)
            if rows is not None:
                change = change * self._per_row(rows, y).reshape(-1, *[1] * (y.dim() - 1))
            total = change if total is None else total + change
        if total is None:
            return y
        if name[1] == "weight":
            total = total * normalised(self.module, x.to(y.device))
        changed = target + total.to(y.dtype)
        if self.name.rows is None:
            return changed
        start, stop = self.name.rows
        return torch.cat(
            [y.narrow(axis, 0, start), changed, y.narrow(axis, stop, y.shape[axis] - stop)], axis
        )


def _rows(y: Tensor, axis: int, rows: tuple[int, int]) -> Tensor:
    return y.narrow(axis, rows[0], rows[1] - rows[0])
