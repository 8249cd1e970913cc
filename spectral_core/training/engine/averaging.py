"""The parameters to use, where they are not those that the optimiser moves: EMA, and schedule-free's average.

EMA: a ← d·a + (1 − d)·p after each step, with d = min(decay, (1 + n)/(10 + n)) at step n, so that the start
is forgotten quickly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import optim


class Averaging:
    """What the result is made of. ``averages`` is empty without an EMA."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimisers: Sequence[torch.optim.Optimizer], decay: float
    ) -> None:
        self._parameters, self._optimisers, self._decay = list(parameters), optimisers, decay
        self.averages: list[Tensor] = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step ``step`` (the first is 1)."""
        if self.averages:
            decay = min(self._decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the parameters to use in place, for good; the optimisers must not step after it."""
        optim.set_train_mode(self._optimisers, False)
        for parameter, average in zip(self._parameters, self.averages, strict=bool(self.averages)):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters to use inside the block; afterwards those that train, to the bit."""
        with torch.no_grad():
            before = [p.detach().clone() for p in self._parameters]
        try:
            self.apply()
            yield
        finally:
            optim.set_train_mode(self._optimisers, True)
            with torch.no_grad():
                for parameter, kept in zip(self._parameters, before, strict=True):
                    parameter.copy_(kept)
