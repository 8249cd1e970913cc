"""A gate on its rows, for tests without a layer; the forward path does it in ``attach/update.py``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectral_core.gates.formula import GateRuntime, values
from spectral_core.maths.layers import channel_view


def apply(
    z: Tensor,
    params: Mapping[str, Tensor],
    kind: str,
    rows_per_gate: int,
    is_convolution: bool,
    runtime: GateRuntime,
    name: str,
    budget: float = 0.0,
) -> Tensor:
    """G(z)·z, in the shape and dtype of z."""
    found = values(z, params, kind, rows_per_gate, is_convolution, runtime, name, budget)
    return z * channel_view(found, z, is_convolution)
