"""The two products of a linear layer's update in training, each one node of the graph.

Left to autograd, the update costs two passes over activations that nothing needs: the input's gradient is
made once by the layer and once by the update and then added, and the gradient of a factor's frozen columns
is made and dropped. Here the update's share is accumulated into the gradient that the layer has just made.

    x, z = project(x, down)   before the layer, which takes the x that comes back
    y = add(y, z, up, …)      after it

Saved for backward: x, z and the factors, as for a plain LoRA.

Shapes: x (…, in), down (R, in), z (…, R), up (out, R), y (…, out), factor (B, R).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Project(torch.autograd.Function):
    """(x, down·x). The gradient of the first output has to be a tensor that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, tie: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down)
        ctx.tie = tie
        return x, F.linear(x, down)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        if dz is None:
            return dx, None, None
        d_rows = dz.flatten(0, -2)
        d_down = None if x is None else _down_gradient(d_rows, x.flatten(0, -2), ctx.tie)
        if not ctx.needs_input_grad[0]:
            return None, d_down, None
        if dx is None:
            return dz @ down, d_down, None
        if torch.is_grad_enabled() or not dx.is_contiguous():  # a graph of the backward pass is asked for
            return torch.addmm(dx.flatten(0, -2), d_rows, down).view_as(dx), d_down, None
        dx.flatten(0, -2).addmm_(d_rows, down)
        return dx, d_down, None


def _down_gradient(d_rows: Tensor, x: Tensor, tie: Tensor | None) -> Tensor:
    """d_rowsᵀ·x (R, in) from d_rows (T, R); of a tied one all in its first half."""
    if tie is None:
        return d_rows.mT @ x
    first, second = d_rows.chunk(2, 1)
    found = torch.addcmul(first, second, tie).mT @ x
    return torch.cat([found, torch.zeros_like(found)])


class _Add(torch.autograd.Function):
    """y + scale · up·z; ``frozen`` last columns of up get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, up: Tensor, scale: float, frozen: int, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[2] else None, up)
        ctx.scale, ctx.frozen = scale, frozen
        if in_place:
            ctx.mark_dirty(y)
        return added(y, z, up, scale, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, up = ctx.saved_tensors
        dz, d_up = gradients(dy, z, up, ctx.scale, ctx.frozen, ctx.needs_input_grad[1])
        return dy, dz, d_up, None, None, None


def added(y: Tensor, z: Tensor, up: Tensor, scale: float, in_place: bool) -> Tensor:
    """y + scale · up·z; y contiguous, written to where ``in_place``."""
    rows = z.flatten(0, -2)
    if in_place:
        y.flatten(0, -2).addmm_(rows, up.mT, alpha=scale)
        return y
    return torch.addmm(y.flatten(0, -2), rows, up.mT, alpha=scale).view_as(y)


def added_batched(y: Tensor, z: Tensor, right: Tensor, scale: float, in_place: bool) -> Tensor:
    """y + scale · z·right, a matrix ``right`` (B, R, out) for each batch row."""
    product = y.baddbmm_ if in_place else y.baddbmm
    return product(z, right, alpha=scale)


def gradients(
    dy: Tensor, z: Tensor | None, up: Tensor, scale: float, frozen: int = 0, of_z: bool = True
) -> tuple[Any, Tensor | None]:
    """The gradients of z (where ``of_z``) and of up (where z is given) from that of y + scale · up·z.

    The last ``frozen`` columns of up get none.
    """
    d_up = None
    if z is not None:
        d_up = _product_like(up, dy.flatten(0, -2), z.flatten(0, -2)[:, : up.shape[1] - frozen])
        d_up = d_up if scale == 1.0 else d_up * scale
        d_up = F.pad(d_up, (0, frozen)) if frozen else d_up
    return dy @ (up if scale == 1.0 else up * scale) if of_z else None, d_up


def _product_like(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right laid out in memory as ``like``: what made it transforms its gradient without a copy."""
    return left.mT @ right if like.is_contiguous() else (right.mT @ left).mT


class _AddGated(torch.autograd.Function):
    """y + scale · up·(factor·z). on_up: the factor multiplies a copy of up for each batch row, else z."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, up: Tensor, factor: Tensor, scale: float, on_up: bool, in_place: bool
    ) -> Tensor:
        rows = None if on_up else z * factor[:, None]
        ctx.save_for_backward(z, up, factor, rows)
        ctx.scale = scale
        if in_place:
            ctx.mark_dirty(y)
        if rows is None:
            return added_batched(y, z, (up * factor[:, None]).mT, scale, in_place)
        return added(y, rows, up, scale, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, up, factor, rows = ctx.saved_tensors
        d_up: Tensor | None
        if rows is None:
            dz, d_up, d_factor = gated_gradients(dy, z, up, factor, ctx.scale)
        else:
            rows = z * factor[:, None] if torch.is_grad_enabled() else rows  # for a graph of this pass
            d_rows, d_up = gradients(dy, rows, up, ctx.scale)
            dz, d_factor = d_rows * factor[:, None], (d_rows * z).sum(1)
        return dy, dz, d_up, d_factor if ctx.needs_input_grad[3] else None, None, None, None


def gated_gradients(
    dy: Tensor, z: Tensor, up: Tensor, factor: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z, up and factor from that of y + scale · up·(factor·z)."""
    factor = factor if scale == 1.0 else factor * scale
    each = factor[:, None, :]
    outer = torch.bmm(dy.mT, z)  # (B, out, R)
    d_factor = (outer * up).sum(1)
    return torch.bmm(dy, up * each), (outer * each).sum(0), d_factor if scale == 1.0 else d_factor * scale


def project(x: Tensor, down: Tensor, tie: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x for the layer, z = down·x).

    Where x needs a gradient, the layer's gradient of it has to be fresh. tie: (R/2,), what is trained in the
    second half of down is this times what is trained in its first; the whole gradient is then given to the
    first half, in one product instead of two.
    """
    given, z = _Project.apply(x, down, tie)  # type: ignore[no-untyped-call]
    return given if x.requires_grad else x, z  # else the layer would make a gradient that nobody needs


def add(y: Tensor, z: Tensor, up: Tensor, scale: float, frozen: int, in_place: bool) -> Tensor:
    """y + scale · up·z; y contiguous, written to where ``in_place``."""
    return _Add.apply(y, z, up, scale, frozen, in_place)  # type: ignore[no-any-return, no-untyped-call]


def add_gated(
    y: Tensor, z: Tensor, up: Tensor, factor: Tensor, scale: float, on_up: bool, in_place: bool
) -> Tensor:
    """y + scale · up·(factor·z), y and z 3-dimensional, factor (B, R) or (B, 1); y contiguous.

    on_up: the factor multiplies a copy of up for each batch row, and not z.
    """
    return _AddGated.apply(y, z, up, factor, scale, on_up, in_place)  # type: ignore[no-any-return, no-untyped-call]
