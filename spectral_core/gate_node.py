"""The adaptive gate of a training step as one node of the graph.

A gate is a dozen operations on a handful of numbers. Left to autograd, it and its backward are about sixty
calls and five passes over z, more than the two products that it stands between; here they are half as many
calls and two passes. The formulas are those of :mod:`.gate`, whose ``entropy`` kind stays with autograd.

Saved for backward: z, which the products keep as well, and the handful of numbers.

Shapes: z (B, …, R) or (B, R, *space), R = rank · rows_per_gate; values (B, R); φ, logits and p (B, rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import products
from .gate import FLOOR, NORM_EPS, energy, network, tokens_of
from .gate_runtime import GateRuntime
from .layers import channel_view


class _How(NamedTuple):
    """The gate's temperature, whether its values are 0/1, whether p is wanted beside them, and z's layout."""

    temperature: float
    hard: bool
    with_p: bool
    rows_per_gate: int
    is_convolution: bool


def _opened(z: Tensor, weights: Sequence[Tensor], mu: Tensor, how: _How) -> tuple[Tensor, ...]:
    """G(z), p, φ, logits, and what :func:`_gradients` needs besides them."""
    total, tokens = energy(z, how.rows_per_gate, how.is_convolution)
    mean_square = torch.add(_floor(total.dtype, total.device), total, alpha=1 / tokens)
    phi = mean_square.log()
    normed, level, scale = torch.native_layer_norm(phi, phi.shape[1:], None, None, NORM_EPS)
    seen = torch.cat([normed, level - mu], 1)
    hidden, active, logits = network(seen, *weights)
    p = torch.sigmoid(logits / how.temperature)
    values = ((logits > 0) if how.hard else p).to(z.dtype)
    if how.rows_per_gate == 2:
        values = torch.cat([values, values], 1)
    elif how.with_p and not how.hard:
        values = values.clone()
    return values, p, phi, logits, mean_square, level, scale, seen, hidden, active


def _kept(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All of them but the logits."""
    return (*found[:3], *found[4:])


def _gradients(
    z: Tensor,
    kept: Sequence[Tensor],
    w1: Tensor,
    w2: Tensor,
    how: _How,
    d_rows: Tensor | None,
    d_values: Tensor | None,
    d_p: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of z and of the four weights. d_rows: what z has already, which may be written to."""
    values, p, phi, mean_square, level, scale, seen, hidden, active = kept
    d_open = None if d_values is None else d_values.to(p.dtype)
    if d_open is not None and how.rows_per_gate == 2:
        d_open = d_open.unflatten(1, (2, -1)).sum(1)
    if d_p is not None:
        d_open = d_p if d_open is None else d_open + d_p
    if d_open is None:
        return d_rows, None, None, None, None
    d_logits = torch.ops.aten.sigmoid_backward(d_open, p) / how.temperature
    d_hidden = torch.ops.aten.silu_backward(d_logits @ w2, hidden)
    # φ = log m with m = mean z² + floor, so ∂φ/∂z = 2z / (tokens · m)
    slope = _features_gradient(d_hidden @ w1, phi, level, scale) / mean_square
    slope = torch.cat([slope, slope], 1) if how.rows_per_gate == 2 else slope
    slope = channel_view(slope.to(z.dtype), z, how.is_convolution)
    factor = 2 * values.numel() / z.numel()
    if d_rows is None:
        d_z = z * slope * factor
    elif d_rows.is_contiguous():
        d_z = d_rows.addcmul_(z, slope, value=factor)
    else:  # an expanded gradient cannot be added to
        d_z = torch.addcmul(d_rows, z, slope, value=factor)
    return d_z, d_hidden.mT @ seen, d_hidden.sum(0), d_logits.mT @ active, d_logits.sum(0)


class _Gate(torch.autograd.Function):
    """(z or, where ``multiply``, G(z)·z; G(z); p where it is wanted; φ; logits).

    φ and the logits have no gradients. That of the first output has to be a tensor that nobody else holds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        bias: Tensor,
        mu: Tensor,
        how: _How,
        multiply: bool,
    ) -> tuple[Tensor | None, ...]:
        found = _opened(z, (w1, b1, w2, bias), mu, how)
        values, p, phi, logits = found[:4]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, *_kept(found), w1, w2)
        ctx.mark_non_differentiable(phi, logits)
        ctx.how, ctx.multiply = how, multiply
        rows = z * channel_view(values, z, how.is_convolution) if multiply else z
        return rows, values, p if how.with_p else None, phi, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_rows: Tensor | None, d_values: Tensor | None, d_p: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        z, *kept, w1, w2 = ctx.saved_tensors
        if ctx.multiply and d_rows is not None:
            over = tokens_of(z, ctx.how.is_convolution)
            share = d_rows * z
            share = share.sum(over) if over else share
            d_values = share if d_values is None else d_values + share
            d_rows = d_rows * channel_view(kept[0], z, ctx.how.is_convolution)
        return *_gradients(z, kept, w1, w2, ctx.how, d_rows, d_values, d_p), None, None, None


class _AddOpened(torch.autograd.Function):
    """(y + scale · up·(G(z)·z); p where it is wanted; φ; logits): the gate and the product behind it.

    z is (B, T, R). on_up: the values go on a copy of up for each batch row, else on z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        bias: Tensor,
        up: Tensor,
        mu: Tensor,
        how: _How,
        scale: float,
        on_up: bool,
        in_place: bool,
    ) -> tuple[Tensor | None, ...]:
        found = _opened(z, (w1, b1, w2, bias), mu, how)
        values, p, phi, logits = found[:4]
        rows = None if on_up else z * values[:, None]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, up, rows, *_kept(found), w1, w2)
        ctx.mark_non_differentiable(phi, logits)
        ctx.how, ctx.scale = how, scale
        if in_place:
            ctx.mark_dirty(y)
        if rows is None:
            added = products.added_batched(y, z, (up * values[:, None]).mT, scale, in_place)
        else:
            added = products.added(y, rows, up, scale, in_place)
        return added, p if how.with_p else None, phi, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_p: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        z, up, rows, *kept, w1, w2 = ctx.saved_tensors
        dz = d_values = d_up = None
        if dy is not None and rows is None:
            dz, d_up, d_values = products.gated_gradients(dy, z, up, kept[0], ctx.scale)
        elif dy is not None:
            d_rows, d_up = products.gradients(dy, rows, up, ctx.scale)
            d_values = (d_rows * z).sum(1)
            dz = d_rows.mul_(kept[0][:, None])
        return dy, *_gradients(z, kept, w1, w2, ctx.how, dz, d_values, d_p), d_up, *(None,) * 5


@lru_cache(maxsize=16)
def _floor(dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a tensor: then scaling and adding are one operation."""
    with torch.inference_mode(False):
        return torch.full((), FLOOR, dtype=dtype, device=device)


def _features_gradient(d_seen: Tensor, phi: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient of φ (B, rank) from that of [LayerNorm(φ), mean(φ) − μ] (B, rank + 1); mean and scale are
    the LayerNorm's."""
    rank = phi.shape[1]
    inputs = d_seen[:, :rank].contiguous(), phi, [rank], mean, scale, None, None, [True, False, False]
    through_norm: Tensor = torch.ops.aten.native_layer_norm_backward(*inputs)[0]
    return torch.add(through_norm, d_seen[:, rank:], alpha=1 / rank)


def fits(z: Tensor, kind: str, mode: str) -> bool:
    """Whether the gate of z is one that the node computes; otherwise :func:`.gate.values` does.

    A hard gate has no gradients, so there is nothing to save.
    """
    plain = kind == "mlp" and mode != "hard" and z.dtype != torch.float64 and torch.is_grad_enabled()
    return plain and not torch.is_autocast_enabled(z.device.type) and not torch.compiler.is_compiling()


class Gate(NamedTuple):
    """One layer's gate in training: its tensors, how z is laid out, the adapter's runtime, its name there."""

    params: Mapping[str, Tensor]
    rows_per_gate: int
    is_convolution: bool
    runtime: GateRuntime
    name: str

    def _given(self) -> tuple[list[Tensor], Tensor, _How]:
        weights = [self.params[key] for key in ("gate.w1", "gate.b1", "gate.w2", "gate.bias")]
        now = self.runtime
        how = _How(now.temperature, now.mode != "soft", now.wants_p, self.rows_per_gate, self.is_convolution)
        return weights, now.mu(self.name, self.params["gate.mu"]), how

    def open_rows(self, z: Tensor, multiply: bool) -> tuple[Tensor, Tensor]:
        """(G(z)·z where ``multiply``, else z; G(z) (B, R) in z's dtype), and the runtime has seen them.

        Use the z that comes back: its gradient passes through the node, which adds the gate's share in place.
        """
        weights, mu, how = self._given()
        rows, values, p, phi, logits = _Gate.apply(z, *weights, mu, how, multiply)  # type: ignore[no-untyped-call]
        self.runtime.watch(self.name, phi, logits, p)
        return rows, values

    def add_opened(
        self, y: Tensor, z: Tensor, up: Tensor, scale: float, on_up: bool, in_place: bool
    ) -> Tensor:
        """y + scale · up·(G(z)·z), z (B, T, R), written to y where ``in_place``; the runtime sees the gate.

        on_up: multiply a copy of up for each batch row, and not z.
        """
        weights, mu, how = self._given()
        found = _AddOpened.apply(y, z, *weights, up, mu, how, scale, on_up, in_place)  # type: ignore[no-untyped-call]
        added, p, phi, logits = found
        self.runtime.watch(self.name, phi, logits, p)
        return added  # type: ignore[no-any-return]
