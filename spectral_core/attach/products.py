"""The two products of a linear layer's update in training, each one node of the graph.

Left to autograd, the update costs two passes over activations that nothing needs: the input's gradient is
made once by the layer and once by the update and then added, and the gradient of a factor's frozen columns
is made and dropped. Here the update's share is accumulated into the gradient that the layer has just made.

    x, (z,) = project(x, [down])   before the layer, which takes the x that comes back
    y = add(y, z, up, …)           after it

Several layers that read one x may have their first products made together. Saved for backward: x, z and the
factors, as for a plain LoRA.

Shapes: x (…, in), down (R, in), z (…, R), up (out, R), y (…, out), factor (B, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ties = Sequence[Tensor | None]
"""For each down: (R/2,), what is trained in its second half is this times what is trained in its first; or
None. With one, the whole gradient is given to the first half, in one product instead of two."""


class _Project(torch.autograd.Function):
    """(x, down₁·x, down₂·x, …), one product for all of them.

    The gradient of the first output has to be a tensor that nobody else holds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ties: Ties, *downs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *downs)
        ctx.ties = ties
        return x, *F.linear(x, joined(downs)).split([len(down) for down in downs], -1)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *dz: Tensor | None) -> tuple[Any, ...]:
        x, *downs = ctx.saved_tensors
        together = side_by_side(dz, [len(down) for down in downs])
        dx, d_downs = project_gradients(x, downs, ctx.ties, dx, together, ctx.needs_input_grad[0])
        # a layer that did not run has no gradient, which is not a gradient of zero
        return dx, None, *(None if part is None else found for part, found in zip(dz, d_downs, strict=True))


def joined(downs: Sequence[Tensor]) -> Tensor:
    """Several down as one (ΣR, in)."""
    return downs[0] if len(downs) == 1 else torch.cat(tuple(downs))


def side_by_side(parts: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """The parts joined along their last axis, zeros for one that is missing; nothing where all are."""
    given = [part for part in parts if part is not None]
    if len(given) < 2 and len(given) == len(parts):
        return given[0]
    if not given:
        return None
    like = given[0]
    filled = [
        like.new_zeros(*like.shape[:-1], width) if part is None else part
        for part, width in zip(parts, widths, strict=True)
    ]
    return torch.cat(filled, -1)


def project_gradients(
    x: Tensor | None,
    downs: Sequence[Tensor],
    ties: Ties,
    dx: Tensor | None,
    dz: Tensor | None,
    of_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x (where ``of_x``), added to dx in place where that can be, and those of every down.

    x: None where no down needs one. dz (…, ΣR) of all.
    """
    if dz is None:
        return dx, [None] * len(downs)
    d_rows = dz.flatten(0, -2)
    d_downs = [None] * len(downs) if x is None else _down_gradients(d_rows, x.flatten(0, -2), downs, ties)
    if not of_x:
        return None, d_downs
    down = joined(downs)
    if dx is None:
        return dz @ down, d_downs
    if torch.is_grad_enabled() or not dx.is_contiguous():  # a graph of the backward pass is asked for
        return torch.addmm(dx.flatten(0, -2), d_rows, down).view_as(dx), d_downs
    dx.flatten(0, -2).addmm_(d_rows, down)
    return dx, d_downs


def _down_gradients(d_rows: Tensor, x: Tensor, downs: Sequence[Tensor], ties: Ties) -> list[Any]:
    """d_rowsᵀ·x (R, in) for every down, from d_rows (T, ΣR); of a tied one all in its first half."""
    rows = [len(down) for down in downs]
    tied = [tie for tie in ties if tie is not None]
    if not tied:
        return list((d_rows.mT @ x).split(rows))
    if len(tied) < len(rows) or len(set(rows)) > 1:
        parts = zip(d_rows.split(rows, 1), downs, ties, strict=True)
        return [_down_gradients(part, x, [down], [tie])[0] for part, down, tie in parts]
    halves = d_rows.unflatten(1, (len(rows), 2, -1))
    both = torch.addcmul(halves[:, :, 0], halves[:, :, 1], torch.stack(tied))
    found = x.new_zeros(len(rows), rows[0], x.shape[1])
    found[:, : rows[0] // 2] = (both.flatten(1).mT @ x).unflatten(0, (len(rows), -1))
    return list(found.unbind())


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


def project(x: Tensor, downs: Sequence[Tensor], ties: Ties | None = None) -> tuple[Tensor, list[Tensor]]:
    """(x for the layers, z = down·x for each down).

    Where x needs a gradient, the layers' gradients of it have to be fresh.
    """
    given, *z = _Project.apply(x, ties or [None] * len(downs), *downs)  # type: ignore[no-untyped-call]
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
