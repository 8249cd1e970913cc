"""Noticing that a run goes wrong, and saying where.

A loss that is not finite, or a smoothed loss far above what the run began with and above the power of the
target (what predicting nothing costs), stops the run. The culprit is looked for in this order: the training
data, the parameters, the gradients, and the first layer whose output is not finite when the batch runs again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.events import Smoothed

FIRST = 20  # steps whose median, or the first of them if it is higher, is the level that the run began with
_QUICK = 0.9  # smoothing: quick enough to stop within a few steps, slow enough for one odd batch


@dataclass
class Watch:
    """Follows the loss. ``factor``: how many times its first level is too much; 0 watches for NaN only."""

    factor: float
    first: list[float] = field(default_factory=list)
    loss: Smoothed = field(default_factory=lambda: Smoothed(_QUICK))
    power: Smoothed = field(default_factory=lambda: Smoothed(_QUICK))

    def limit(self) -> float:
        if not self.factor or not self.first:
            return math.inf
        began = max(self.first[0], statistics.median_low(self.first))  # a loss that falls is none that rises
        return self.factor * max(began, self.power.value)

    def add(self, loss: float, power: float) -> tuple[bool, bool]:
        """(has it exploded, is the state good): loss and power Σ target²/n of a step."""
        self.power.add(power)
        if len(self.first) < FIRST:
            self.first.append(loss)
        smoothed = self.loss.add(loss)
        return smoothed > self.limit(), smoothed <= self.limit() / 2

    def state(self) -> dict[str, Any]:
        return {
            "first": list(self.first),
            "loss": [self.loss.total, self.loss.weight],
            "power": [self.power.total, self.power.weight],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.first = list(state["first"])
        self.loss = Smoothed(_QUICK, *state["loss"])
        self.power = Smoothed(_QUICK, *state["power"])


def bad_tensors(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the tensors with values that are not finite."""
    return [name for name, t in named if t is not None and not bool(torch.isfinite(t).all())]


def first_bad_layer(modules: Sequence[tuple[str, nn.Module]], run: Callable[[], object]) -> str | None:
    """The first of these modules whose output is not finite while ``run`` runs, by the order of their
    calls."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return look

    with ExitStack() as undo, torch.no_grad():
        for name, module in modules:
            undo.callback(module.register_forward_hook(hook(name)).remove)
        run()
    return found[0] if found else None


class LastGood:
    """The trained tensors as they were after the last step that was in order; ``step`` is its number."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        self.values = [p.detach().clone() for _, p in self._named]
        self.step = 0

    def keep(self, step: int) -> None:
        """What the tensors are now, after that step."""
        torch._foreach_copy_(self.values, [p.detach() for _, p in self._named])
        self.step = step

    def put_back(self) -> None:
        with torch.no_grad():
            for (_, parameter), kept in zip(self._named, self.values, strict=True):
                parameter.copy_(kept)

    def most_changed(self) -> str:
        """The tensor that has moved farthest since, in relation to its size."""
        grown = {
            name: float((p.detach() - kept).norm() / (kept.norm() + 1e-6))
            for (name, p), kept in zip(self._named, self.values, strict=True)
        }
        return max(grown, key=lambda name: grown[name])
