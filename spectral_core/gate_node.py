"""The adaptive gate of a training step as one node of the graph.

A gate is a dozen operations on a handful of numbers. Left to autograd, it and its backward are about sixty
calls and five passes over z, more than the two products that it stands between; here they are half as many
calls and two passes. The formulas are those of :mod:`.gate`, whose ``entropy`` kind stays with autograd.

Saved for backward: z, which the products keep as well, and the handful of numbers.

Shapes: z (B, …, R) or (B, R, *space), R = rank · rows_per_gate; values (B, R); φ, logits and p (B, rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gate import FLOOR, NORM_EPS, energy, network, tokens_of
from .gate_runtime import GateRuntime
from .layers import channel_view


class _Gate(torch.autograd.Function):
    """(z or, where ``multiply``, G(z)·z; G(z); p where ``with_p``; φ; logits); no gradients of the last two.

    The gradient of the first output has to be a tensor that nobody else holds.
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
        temperature: float,
        hard: bool,
        multiply: bool,
        with_p: bool,
        rows_per_gate: int,
        is_convolution: bool,
    ) -> tuple[Tensor | None, ...]:
        total, tokens = energy(z, rows_per_gate, is_convolution)
        mean_square = torch.add(_floor(total.dtype, total.device), total, alpha=1 / tokens)
        phi = mean_square.log()
        normed, level, scale = torch.native_layer_norm(phi, phi.shape[1:], None, None, NORM_EPS)
        seen = torch.cat([normed, level - mu], 1)
        hidden, active, logits = network(seen, w1, b1, w2, bias)
        p = torch.sigmoid(logits / temperature)
        values = ((logits > 0) if hard else p).to(z.dtype)
        if rows_per_gate == 2:
            values = torch.cat([values, values], 1)
        elif with_p and not hard:
            values = values.clone()
        ctx.set_materialize_grads(False)
        kept = (mean_square, phi, level, scale, seen, hidden, active)
        ctx.save_for_backward(z, values, p, *kept, w1, w2)
        ctx.mark_non_differentiable(phi, logits)
        ctx.temperature, ctx.multiply = temperature, multiply
        ctx.pairs, ctx.is_convolution = rows_per_gate == 2, is_convolution
        rows = z * channel_view(values, z, is_convolution) if multiply else z
        return rows, values, p if with_p else None, phi, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_rows: Tensor | None, d_values: Tensor | None, d_p: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        z, values, p, *kept, w1, w2 = ctx.saved_tensors
        mean_square, phi, level, scale, seen, hidden, active = kept
        over = tokens_of(z, ctx.is_convolution)
        if ctx.multiply and d_rows is not None:
            share = d_rows * z
            share = share.sum(over) if over else share
            d_values = share if d_values is None else d_values + share
            d_rows = d_rows * channel_view(values, z, ctx.is_convolution)
        d_open = None if d_values is None else d_values.to(p.dtype)
        if d_open is not None and ctx.pairs:
            real, imaginary = d_open.chunk(2, 1)
            d_open = real + imaginary
        if d_p is not None:
            d_open = d_p if d_open is None else d_open + d_p
        if d_open is None:
            return d_rows, *(None,) * 11
        d_logits = torch.ops.aten.sigmoid_backward(d_open, p) / ctx.temperature
        d_hidden = torch.ops.aten.silu_backward(d_logits @ w2, hidden)
        # φ = log m with m = mean z² + floor, so ∂φ/∂z = 2z / (tokens · m)
        slope = _features_gradient(d_hidden @ w1, phi, level, scale) / mean_square
        slope = torch.cat([slope, slope], 1) if ctx.pairs else slope
        slope = channel_view(slope.to(z.dtype), z, ctx.is_convolution)
        factor = 2 * values.numel() / z.numel()
        if d_rows is None:
            d_z = z * slope * factor
        elif d_rows.is_contiguous():
            d_z = d_rows.addcmul_(z, slope, value=factor)
        else:  # an expanded gradient cannot be added to
            d_z = torch.addcmul(d_rows, z, slope, value=factor)
        weights = d_hidden.mT @ seen, d_hidden.sum(0), d_logits.mT @ active, d_logits.sum(0)
        return d_z, *weights, *(None,) * 7


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


def open_rows(
    z: Tensor,
    params: Mapping[str, Tensor],
    rows_per_gate: int,
    is_convolution: bool,
    runtime: GateRuntime,
    name: str,
    multiply: bool,
) -> tuple[Tensor, Tensor]:
    """(G(z)·z where ``multiply``, else z; G(z) (B, R) in z's dtype), and the runtime has seen them.

    Use the z that comes back: its gradient passes through the node, which adds the gate's share in place.
    """
    weights = (params[key] for key in ("gate.w1", "gate.b1", "gate.w2", "gate.bias"))
    hard, mu = runtime.mode != "soft", runtime.mu(name, params["gate.mu"])
    found = _Gate.apply(  # type: ignore[no-untyped-call]
        z, *weights, mu, runtime.temperature, hard, multiply, runtime.wants_p, rows_per_gate, is_convolution
    )
    rows, values, p, phi, logits = found
    runtime.watch(name, phi, logits, p)
    return rows, values
