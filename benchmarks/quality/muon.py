"""torch's Muon for adapters: it orthogonalises updates, so that a rotated basis is the same to it.

Shapes: any parameters of two or more axes; each is a matrix (first axis, all others).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine import optim


class _Matrices(torch.optim.Optimizer):
    """``torch.optim.Muon`` on the parameters as matrices, which share their memory."""

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig) -> None:
        super().__init__(groups, {})
        self.inner = []
        for group in self.param_groups:
            matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in group["params"]]
            inner = torch.optim.Muon(
                matrices, lr=group["lr"], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self.inner.append((inner, matrices))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, (inner, matrices) in zip(self.param_groups, self.inner, strict=True):
            for parameter, matrix in zip(group["params"], matrices, strict=True):
                matrix.grad = None if parameter.grad is None else parameter.grad.view(matrix.shape)
            inner.param_groups[0]["lr"] = group["lr"]
            inner.step()


@contextmanager
def in_place_of_adamw() -> Iterator[None]:
    """Inside, the setting ``adamw`` is Muon; of the gates' own optimiser nothing changes."""
    kept = optim.BUILDERS["adamw"]
    optim.BUILDERS["adamw"] = _Matrices
    try:
        yield
    finally:
        optim.BUILDERS["adamw"] = kept
