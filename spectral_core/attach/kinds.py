"""Which update a layer has: of a linear or convolution weight, of a transposed convolution's, of a vector.

Shapes: :mod:`..maths.layers`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..maths.layers import channel_view, expand, spread
from ..names.layer_name import LayerName
from .update import LayerUpdate
from .vectors import VectorUpdate


class TransposedUpdate(LayerUpdate):
    """One adapter's update of a transposed convolution: up (in, R), then down (R, out, *kernel) walks."""

    def _add(self, x: Tensor, y: Tensor, strength: float | Tensor, in_place: bool) -> Tensor:
        x = x.to(y.device)
        if self.name.rows is not None:  # of the weight, which begins with the inputs
            first, end = self.name.rows
            x = x.narrow(1, first, end - first)
        for piece in self.pieces:
            scale, rows, folded = self._split(strength, piece)
            down, up, _ = piece.ready(x.device, self._dtype_for(x), folded)
            z = expand(x, up.mT, True)
            if rows is not None:
                z = z * channel_view(self._per_row(rows, z)[:, None], z, True)
            y = y.add(spread(z, down, self.geometry, tuple(y.shape[2:])).to(y.dtype), alpha=scale)
        return y


def update_of(name: LayerName, module: nn.Module) -> type[LayerUpdate]:
    """The class of the update of this layer at this module."""
    if name.vector:
        return VectorUpdate
    return TransposedUpdate if getattr(module, "transposed", False) else LayerUpdate
