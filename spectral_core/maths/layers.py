"""Shapes and geometry of the layers that an adapter can change: linear and convolution.

Shapes: a linear weight is (out, in); a convolution's is (out, in, *kernel), kernel of length 1, 2 or 3. In a
grouped one ``in`` is a group's; a transposed one's weight has them the other way round, (in, out, *kernel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SpectralAdapterError

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class LayerShape:
    """Shape of an adapted weight; ``kernel`` is empty for a linear layer."""

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, weight: Tensor) -> LayerShape:
        """Shape of a weight (out, in, *kernel); works on meta tensors too."""
        if weight.dim() < 2 or weight.dim() > 5:
            raise SpectralAdapterError(
                f"a weight of shape {tuple(weight.shape)} cannot be adapted: expected a linear (out, in) or "
                "a convolution (out, in, *kernel) weight"
            )
        out_features, in_features, *kernel = weight.shape
        return cls(out_features, in_features, tuple(kernel))

    @property
    def fan_in(self) -> int:
        """Columns of the weight seen as a matrix: in · Π kernel."""
        return self.in_features * math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features, *self.kernel)

    @property
    def max_rank(self) -> int:
        return min(self.out_features, self.fan_in)

    def __str__(self) -> str:
        return "×".join(str(n) for n in self.weight_shape)


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; a linear layer has none of it."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    pad_sides: tuple[
        int, ...
    ] = ()  # both sides of each axis, last axis first, for the modes that F.pad serves
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Geometry of any module with a weight; told by attributes, not by class (hosts have their own)."""
        if not hasattr(module, "kernel_size"):
            return cls()
        return cls(
            stride=tuple(module.stride),  # type: ignore[arg-type]
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),  # type: ignore[arg-type]
            dilation=tuple(module.dilation),  # type: ignore[arg-type]
            padding_mode=str(getattr(module, "padding_mode", "zeros")),
            pad_sides=tuple(getattr(module, "_reversed_padding_repeated_twice", ())),
            groups=int(getattr(module, "groups", 1)),
        )


def project(x: Tensor, down: Tensor, geometry: Geometry) -> Tensor:
    """z = down · x, the layer's own walk over x with ``down`` (R, in, *kernel) in place of its weight.

    x is (…, in) for a linear ``down`` and (B, in, *space) for a convolution; z has R in that place, and where
    the convolution is grouped R for each group.
    """
    if down.dim() == 2:
        return F.linear(x, down)
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        x = F.pad(x, geometry.pad_sides, mode=geometry.padding_mode)
        padding = (0,) * (down.dim() - 2)
    convolve = _CONVOLUTIONS[down.dim() - 2]
    if geometry.groups != 1:
        down = down.repeat(geometry.groups, *(1,) * (down.dim() - 1))
    return convolve(x, down, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def expand(z: Tensor, up: Tensor, is_convolution: bool, groups: int = 1) -> Tensor:
    """y = up · z with ``up`` (out, R): a linear layer, or a convolution with a 1×1 kernel, in ``groups``
    groups of which z has R each."""
    if not is_convolution:
        return F.linear(z, up)
    space = z.dim() - 2
    return _CONVOLUTIONS[space](z, up.reshape(*up.shape, *(1,) * space), groups=groups)


def spread(z: Tensor, down: Tensor, geometry: Geometry, size: tuple[int, ...]) -> Tensor:
    """down · z as a transposed convolution walks, onto a space of this size; ``down`` (R, out, *kernel)."""
    assert isinstance(geometry.padding, tuple)
    steps = zip(
        size, z.shape[2:], down.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
    )
    more = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in steps]
    transposed = _TRANSPOSED[down.dim() - 2]
    return transposed(z, down, None, geometry.stride, geometry.padding, more, 1, geometry.dilation)


def channel_view(values: Tensor, z: Tensor, is_convolution: bool) -> Tensor:
    """``values`` (B, R) shaped to multiply z: (B, R, *space) for a convolution, (B, …, R) otherwise."""
    if is_convolution:
        return values.reshape(*values.shape, *(1,) * (z.dim() - 2))
    return values.reshape(values.shape[0], *(1,) * (z.dim() - 2), values.shape[1])


def as_fp32(tensor: Tensor) -> Tensor:
    """At least float32: the precision in which every factor is folded."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
