"""The adaptive gate of a training step as one node of the graph.

A gate is a dozen operations on a handful of numbers. Left to autograd, it and its backward are about sixty
calls and five passes over z, more than the two products that it stands between; here they are half as many
calls and two passes, and once for all layers that read one input. The formulas are those of
:mod:`..gates.formula`, whose ``entropy`` kind stays with autograd.

Saved for backward: z, which the products keep as well, and the handful of numbers.

Shapes: z (B, …, n·R) or (B, n·R, *space), R = rank · rows_per_gate, of n gates side by side; values (B, n·R);
φ (B, n, rank); which are open, and p, (n, B, rank); weights with the n gates as a first axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gates.formula import FLOOR, NORM_EPS, energy, network, tokens_of
from ..gates.runtime import GateRuntime
from ..maths.compiling import is_compiling
from ..maths.layers import channel_view
from ..maths.precision import autocast_dtype
from . import products

_WEIGHTS = ("gate.w1", "gate.b1", "gate.w2", "gate.bias")
_SIGMOID_BACKWARD = torch.ops.aten.sigmoid_backward.default
_SILU_BACKWARD = torch.ops.aten.silu_backward.default
_LAYER_NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward.default


class Stack(NamedTuple):
    """The tensors of n gates that one node may open, by the gates' names: W₁, b₁, W₂ and the bias (n, …),
    vectors (n, 1, …), and μ (n, 1)."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    mu: Tensor


class _How(NamedTuple):
    """The gates' temperature, whether their values are 0/1, whether p is wanted beside them, z's layout."""

    temperature: float
    hard: bool
    with_p: bool
    rows_per_gate: int
    is_convolution: bool


def _stacked(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """W₁, b₁, W₂ and the bias of n gates, all first ones first, as four tensors (n, …), vectors (n, 1, …);
    which they may be already."""
    if weights[0].dim() == 3:
        return weights
    count = len(weights) // len(_WEIGHTS)
    if count == 1:
        return [each.view(1, -1, each.shape[-1]) for each in weights]
    found = [torch.stack(tuple(weights[i : i + count])) for i in range(0, len(weights), count)]
    return [each if each.dim() == 3 else each.unsqueeze(1) for each in found]


def _opened(z: Tensor, weights: Sequence[Tensor], mu: Tensor, how: _How) -> tuple[Tensor, ...]:
    """G(z), p, φ, which gates are open, and what :func:`_gradients` needs besides them. mu (n, 1)."""
    count, pairs = len(mu), how.rows_per_gate
    total, tokens = energy(z, 1, how.is_convolution)
    total = _per_gate(total, count, pairs)
    mean_square = torch.add(_number(FLOOR, total.dtype, total.device), total, alpha=1 / tokens)
    phi = mean_square.log()
    normed, level, scale = torch.native_layer_norm(phi, phi.shape[2:], None, None, NORM_EPS)
    seen = torch.cat([normed, level - mu], 2).transpose(0, 1)
    hidden, active, logits = network(seen, *weights)
    is_open = logits > 0
    p = torch.sigmoid(logits * _number(1 / how.temperature, logits.dtype, logits.device))
    values = _in(z.dtype, is_open if how.hard else p)
    values = values[0] if count == 1 else values.transpose(0, 1)
    if pairs == 2:
        values = torch.cat([values, values], -1)
    values = values if count == 1 else values.flatten(1)
    return values, p, phi, is_open, mean_square, level, scale, seen, hidden, active


def _per_gate(rows: Tensor, count: int, pairs: int) -> Tensor:
    """What is said of each row (B, n·R), said of each gate (B, n, rank): the sum over a gate's rows."""
    if pairs == 2:
        return rows.reshape(len(rows), count, 2, -1).sum(2)
    return rows.reshape(len(rows), count, -1)


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """In that dtype; asking costs less than a conversion that has nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _kept(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All of them but which are open."""
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
    are_stacked: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of z and of all weights. d_rows: what z has already, which may be written to."""
    values, p, phi, mean_square, level, scale, seen, hidden, active = kept
    count, pairs = len(p), how.rows_per_gate
    d_open = d_p
    if d_values is not None:
        own = _per_gate(_in(p.dtype, d_values), count, pairs).transpose(0, 1)
        d_open = own if d_p is None else own + d_p
    if d_open is None:
        return d_rows, [None] * (len(_WEIGHTS) * (1 if are_stacked else count))
    d_logits = _SIGMOID_BACKWARD(d_open, p)
    d_logits = d_logits.mul_(_number(1 / how.temperature, p.dtype, p.device))
    d_hidden = _SILU_BACKWARD(torch.bmm(d_logits, w2), hidden)
    # φ = log m with m = mean z² + floor, so ∂φ/∂z = 2z / (tokens · m)
    d_seen = torch.bmm(d_hidden, w1).transpose(0, 1)
    slope = _features_gradient(d_seen, phi, level, scale) / mean_square
    slope = torch.cat([slope, slope], 2) if pairs == 2 else slope
    slope = channel_view(_in(z.dtype, slope.flatten(1)), z, how.is_convolution)
    factor = 2 * values.numel() / z.numel()
    if d_rows is None:
        d_z = z * slope * factor
    elif d_rows.is_contiguous():
        d_z = d_rows.addcmul_(z, slope, value=factor)
    else:  # an expanded gradient cannot be added to
        d_z = torch.addcmul(d_rows, z, slope, value=factor)
    d_biases = d_hidden.sum(1, are_stacked), d_logits.sum(1, are_stacked)
    found = torch.bmm(d_hidden.mT, seen), d_biases[0], torch.bmm(d_logits.mT, active), d_biases[1]
    return d_z, list(found) if are_stacked else [gradient for each in found for gradient in each.unbind()]


def _through_product(z: Tensor, values: Tensor, how: _How, d_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, but for the gate's share, and of the values from that of values·z."""
    over = tokens_of(z, how.is_convolution)
    d_values = d_rows * z
    d_values = d_values.sum(over) if over else d_values
    return d_rows * channel_view(values, z, how.is_convolution), d_values


class _Gate(torch.autograd.Function):
    """(z, G(z) or, where ``multiply``, G(z)·z, None; p where it is wanted; φ; which are open), of one gate.

    The last two have no gradients. That of the first output has to be a tensor that nobody else holds.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mu: Tensor, how: _How, multiply: bool, *weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        w1, b1, w2, bias = _stacked(weights)
        found = _opened(z, (w1, b1, w2, bias), mu, how)
        values, p, phi, is_open = found[:4]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, *_kept(found), w1, w2)
        ctx.mark_non_differentiable(phi, is_open)
        ctx.how, ctx.multiply, ctx.are_stacked = how, multiply, weights[0].dim() == 3
        rows = z * channel_view(values, z, how.is_convolution) if multiply else z
        return rows, None if multiply else values, p if how.with_p else None, phi, is_open

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_rows: Tensor | None, d_values: Tensor | None, d_p: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        z, *kept, w1, w2 = ctx.saved_tensors
        if ctx.multiply and d_rows is not None:
            d_rows, d_values = _through_product(z, kept[0], ctx.how, d_rows)
        d_z, d_weights = _gradients(z, kept, w1, w2, ctx.how, d_rows, d_values, d_p, ctx.are_stacked)
        return d_z, None, None, None, *d_weights


class _ProjectOpened(torch.autograd.Function):
    """(x; p where it is wanted; φ; which are open; down·x of every layer; the gates' values of every layer).

    multiply: their product instead of the last two. ``given``: n down, then W₁, b₁, W₂ and the bias of n
    gates, or four stacks of them. φ and what is open have no gradients; that of x has to be a tensor that
    nobody else holds, and so have those of down·x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ties: products.Ties, mu: Tensor, how: _How, multiply: bool, *given: Tensor
    ) -> tuple[Tensor | None, ...]:
        count = len(mu)
        downs = given[:count]
        z = F.linear(x, products.joined(downs))
        w1, b1, w2, bias = _stacked(given[count:])
        found = _opened(z, (w1, b1, w2, bias), mu, how)
        values, p, phi, is_open = found[:4]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, *_kept(found), w1, w2, *downs)
        ctx.mark_non_differentiable(phi, is_open)
        ctx.ties, ctx.how, ctx.count, ctx.multiply = ties, how, count, multiply
        ctx.are_stacked = given[count].dim() == 3
        results = (z * channel_view(values, z, False),) if multiply else (z, values)
        if count > 1:
            each = len(downs[0])
            results = tuple(part for whole in results for part in whole.split(each, -1))
        return x, p if how.with_p else None, phi, is_open, *results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dx: Tensor | None, d_p: Tensor | None, _: None, __: None, *given: Tensor | None
    ) -> tuple[Any, ...]:
        x, z, *saved = ctx.saved_tensors  # once: gradient checkpointing gives them no second time
        count, how = ctx.count, ctx.how
        (*kept, w1, w2), downs = saved[:-count], saved[-count:]
        widths = [len(down) for down in downs]
        d_rows, d_values = given[:count], given[count:]
        dz = products.side_by_side(d_rows, widths)
        d_opened = None if ctx.multiply else products.side_by_side(d_values, widths)
        if ctx.multiply and dz is not None:
            dz, d_opened = _through_product(z, kept[0], how, dz)
        dz, d_weights = _gradients(z, kept, w1, w2, how, dz, d_opened, d_p, ctx.are_stacked)
        needs_x, needs_down = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5 : 5 + count])
        dx, d_downs = products.project_gradients(x if needs_down else None, downs, ctx.ties, dx, dz, needs_x)
        # a layer that did not run has no gradients, which are not gradients of zero
        ran = [d_p is not None or any(part is not None for part in given[i::count]) for i in range(count)]
        alone = d_downs if ctx.are_stacked else [*d_downs, *d_weights]
        found = [each if ran[i % count] else None for i, each in enumerate(alone)]
        return dx, None, None, None, None, *found, *(d_weights if ctx.are_stacked else ())


@lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a tensor: a plain number is made into one, and converted, whenever it is used."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def _features_gradient(d_seen: Tensor, phi: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient of φ from that of [LayerNorm(φ), mean(φ) − μ] (B, n, rank + 1); mean and scale are the
    LayerNorm's."""
    rank = phi.shape[-1]
    d_normed, d_level = d_seen.narrow(-1, 0, rank), d_seen.narrow(-1, rank, 1)
    inputs = d_normed.contiguous(), phi, [rank], mean, scale, None, None, [True, False, False]
    through_norm: Tensor = _LAYER_NORM_BACKWARD(*inputs)[0]
    return torch.add(through_norm, d_level, alpha=1 / rank)


def fits(x: Tensor, kind: str, mode: str) -> bool:
    """Whether a gate of what is made from x is one that the node computes; otherwise
    :func:`..gates.formula.values` does.

    A hard gate has no gradients, so there is nothing to save.
    """
    plain = kind == "mlp" and mode != "hard" and x.dtype != torch.float64 and torch.is_grad_enabled()
    return plain and autocast_dtype(x.device.type) is None and not is_compiling()


class Opened(NamedTuple):
    """One layer's gate values (B, R), None where its rows have them already, and what is known of all gates
    of the node, of which this is one."""

    values: Tensor | None
    phi: Tensor
    is_open: Tensor
    p: Tensor | None
    place: int


class Gate(NamedTuple):
    """One layer's gate in training: its tensors, how z is laid out, the adapter's runtime and its name there,
    and the stack that its tensors are in, if they are."""

    params: Mapping[str, Tensor]
    rows_per_gate: int
    is_convolution: bool
    runtime: GateRuntime
    name: str
    stack: Stack | None = None

    @property
    def _how(self) -> _How:
        now = self.runtime
        return _How(now.temperature, now.mode != "soft", now.wants_p, self.rows_per_gate, self.is_convolution)

    def watch(self, opened: Opened) -> None:
        """Let the runtime see what the gate did, once for each forward pass of its layer."""
        if self.runtime.watches(self.name):
            i, p = opened.place, opened.p
            self.runtime.watch(self.name, opened.phi[:, i], opened.is_open[i], None if p is None else p[i])

    def open_rows(self, z: Tensor, multiply: bool) -> tuple[Tensor, Tensor | None]:
        """(z, G(z) (B, R) in z's dtype) or, where ``multiply``, (G(z)·z, None); the runtime has seen them.

        Use the z that comes back: its gradient passes through the node, which adds the gate's share in place.
        """
        mu, weights = _tensors([self])
        found = _Gate.apply(z, mu, self._how, multiply, *weights)  # type: ignore[no-untyped-call]
        rows, values, p, phi, is_open = found
        self.watch(Opened(values, phi, is_open, p, 0))
        return rows, values


def project(
    x: Tensor, downs: Sequence[Tensor], ties: products.Ties, gates: Sequence[Gate], multiply: bool
) -> tuple[Tensor, list[Tensor], list[Opened]]:
    """(x for the layers, z = down·x of each, what each gate does with its z), as :func:`.products.project`.

    multiply: G(z)·z instead of z. The gates are of one rank, layout and runtime. The runtime has not seen
    them: :meth:`Gate.watch`.
    """
    mu, weights = _tensors(gates)
    found = _ProjectOpened.apply(x, ties, mu, gates[0]._how, multiply, *downs, *weights)  # type: ignore[no-untyped-call]
    given, p, phi, is_open, *rest = found
    z, values = rest[: len(downs)], [None] * len(downs) if multiply else rest[len(downs) :]
    opened = [Opened(each, phi, is_open, p, i) for i, each in enumerate(values)]
    return given if x.requires_grad else x, z, opened


def stacked(groups: Sequence[Sequence[Gate]]) -> list[Stack]:
    """The tensors of every group of gates, the like of all groups in few operations. Differentiable."""
    found: dict[int, Stack] = {}
    alike: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        first = group[0].params[_WEIGHTS[0]]
        alike.setdefault((first.shape, first.device), []).append(i)
    for places in alike.values():
        counts = [len(groups[i]) for i in places]
        gates = [gate for i in places for gate in groups[i]]
        stacks = _stacked([gate.params[key] for key in _WEIGHTS for gate in gates])
        parts = zip(*(each.split(counts) for each in (_levels(gates), *stacks)), strict=True)
        for i, (mu, *weights) in zip(places, parts, strict=True):
            found[i] = Stack(tuple(gate.name for gate in groups[i]), tuple(weights), mu)
    return [found[i] for i in range(len(groups))]


def _tensors(gates: Sequence[Gate]) -> tuple[Tensor, Sequence[Tensor]]:
    """μ (n, 1), and the gates' weights: stacked where a stack of just these gates, and on their device, is at
    hand."""
    stack, first = gates[0].stack, gates[0].params[_WEIGHTS[0]]
    names = tuple(gate.name for gate in gates)
    if stack is not None and stack.names == names and stack.weights[0].device == first.device:
        return stack.mu, stack.weights
    return _levels(gates), [gate.params[key] for key in _WEIGHTS for gate in gates]


def _levels(gates: Sequence[Gate]) -> Tensor:
    """μ of each, (n, 1)."""
    levels = [gate.runtime.mu(gate.name, gate.params["gate.mu"]) for gate in gates]
    return levels[0].view(1, 1) if len(levels) == 1 else torch.stack(levels)[:, None]
