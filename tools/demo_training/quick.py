"""Training steps of the same networks in less time on a processor: bfloat16 and a quicker group norm.

Measured on one AMX core (torch 2.13): the library's backward pass of the group norm takes half of an
autoencoder's step, because it does not run along the channels of a channels-last tensor. The one here writes
the norm as ``y = a x + b`` with ``a`` and ``b`` per picture and channel, so that both passes are sums and
products over whole rows.

Shapes: x is (N, C, *); inside (N, L, C) with the channels last in memory; statistics are (N, C) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _rows(x: Tensor) -> Tensor:
    """(N, C, *) -> (N, L, C), without a copy where the channels are last in memory."""
    return x.movedim(1, -1).flatten(1, -2).contiguous()


def _sum(x: Tensor) -> Tensor:
    """(N, L, C) -> (N, C) in fp32: short sums in the tensor's own type (fp32 inside), then those in fp32."""
    n, length, c = x.shape
    if x.dtype != torch.float32 and length % 64 == 0:
        x = x.view(n, length // 64, 64, c).sum(2)
    return x.sum(1, dtype=torch.float32)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c = x.shape[:2]
        rows = _rows(x)
        count = rows.shape[1] * (c // groups)

        def shared(per_channel: Tensor) -> Tensor:  # the sum over each group, given back to its channels
            total = per_channel.view(n, groups, -1).sum(2, keepdim=True)
            return total.expand(-1, -1, c // groups).reshape(n, c)

        mean = shared(_sum(rows)) / count
        var = shared(_sum(rows * rows)) / count - mean.square()
        rstd = (var.clamp_min(0) + eps).rsqrt()
        a = weight.float() * rstd
        b = bias.float() - mean * a
        y = torch.addcmul(b[:, None].to(rows), rows, a[:, None].to(rows))
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.shared, ctx.count, ctx.shape = shared, count, x.shape
        return y.view(n, *x.shape[2:], c).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, rstd = ctx.saved_tensors
        dy = _rows(grads[0].to(rows))
        total, product = _sum(dy), _sum(dy * rows)
        along = (product - mean * total) * rstd  # the sum of dy times the normalised x
        w = weight.float()
        m0, m1 = ctx.shared(w * total) / ctx.count, ctx.shared(w * along) / ctx.count
        # dx = rstd (w dy - m0 - xhat m1) with xhat = (x - mean) rstd
        k = -rstd.square() * m1
        offset = -rstd * m0 - k * mean
        dx = torch.addcmul(
            torch.addcmul(offset[:, None].to(rows), rows, k[:, None].to(rows)),
            dy,
            (w * rstd)[:, None].to(rows),
        )
        n, c = ctx.shape[:2]
        dx = dx.view(n, *ctx.shape[2:], c).movedim(-1, 1)
        return dx, along.sum(0).to(weight), total.sum(0).to(weight), None, None


class QuickGroupNorm(nn.GroupNorm):
    """The same parameters and the same function."""

    def forward(self, input: Tensor) -> Tensor:
        return _Norm.apply(input, self.weight, self.bias, self.num_groups, self.eps)


def quicken(model: nn.Module) -> nn.Module:
    """Put the quicker norm in the place of every group norm, channels last; the weights stay."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = QuickGroupNorm
    return model.to(memory_format=torch.channels_last)
