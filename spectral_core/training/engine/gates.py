"""The adaptive gates in training: annealing, calibration over the last tenth, and what became of them.

Shapes: E[p] (rank,) per layer; open gates are counts 0 … rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...adapter.adapter import Adapter
from ...attach.attaching import Attachment
from ...gates.record import GateRecorder
from ...methods import FouRAConfig
from ..config.config import TrainConfig
from ..runs.outcome import GateReport

TOLD_EVERY = 10  # steps between events that name the open gates of every layer, which are long
CALIBRATED_FROM = 0.9  # of the steps: E[p], from which gates can be frozen without data, is counted from here


class OpenGates(GateRecorder):
    """Open gates per layer of one step, and over the calibration; kept on the gates' device until asked."""

    def __init__(self) -> None:
        super().__init__(bins=1)
        self._step: dict[str, list[Tensor]] = {}
        self._ranks: dict[str, int] = {}
        self.calibration: dict[str, tuple[float, int, int]] = {}  # layer -> (Σ open gates, steps, rank)

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        self._ranks[layer] = is_open.shape[1]
        self._step.setdefault(layer, []).append(is_open)

    def step(self) -> dict[str, float]:
        """Layer -> mean open gates of the step just done; one transfer for all layers of a shape."""
        alike: dict[Any, list[str]] = {}
        for layer, seen in self._step.items():
            alike.setdefault(tuple((one.shape, one.device) for one in seen), []).append(layer)
        counted: dict[str, float] = {}
        for layers in alike.values():
            passes = zip(*(self._step[layer] for layer in layers), strict=True)
            means = torch.stack([torch.stack(seen).sum(2).float().mean(1) for seen in passes]).mean(0)
            counted.update(zip(layers, means.tolist(), strict=True))
        found = {layer: counted[layer] for layer in self._step}
        self._step.clear()
        return found

    def share(self, step: Mapping[str, float]) -> float:
        """Open gates of a step over all gates."""
        return sum(step.values()) / sum(self._ranks[layer] for layer in step)

    def calibrate(self, step: Mapping[str, float]) -> None:
        """Add a step to the calibration."""
        for layer, mean in step.items():
            total, count, _ = self.calibration.get(layer, (0.0, 0, 0))
            self.calibration[layer] = (total + mean, count + 1, self._ranks[layer])

    def extremes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers of which no gate opened, and of which none closed, since the calibration began."""
        dead = tuple(name for name, (total, _, _) in self.calibration.items() if total == 0)
        always = tuple(n for n, (total, count, rank) in self.calibration.items() if total == count * rank)
        return dead, always


def set_gates(attachments: Sequence[Attachment], config: TrainConfig, fraction: float, begins: bool) -> None:
    """Before a step: τ and mode at this fraction of the schedule, the rank target. begins: E[p] counts afresh
    from this step on."""
    for attachment in attachments:
        attachment.gates.anneal(fraction)
        attachment.gates.target_open = config.target_open
        attachment.gates.penalty_weight = config.gate_penalty
        if begins:
            attachment.gates.start_calibration()


@contextmanager
def not_counted(attachments: Sequence[Attachment]) -> Iterator[None]:
    """What runs inside was counted before."""
    for attachment in attachments:
        attachment.gates.counting = False
    try:
        yield
    finally:
        for attachment in attachments:
            attachment.gates.counting = True


def calibration_step(start: int, steps: int) -> int:
    """The step (from 0) with which the calibration of a schedule from ``start`` to ``steps`` begins."""
    return start + int(CALIBRATED_FROM * (steps - start))


def gate_report(adapter: Adapter, counted: OpenGates | None = None) -> GateReport | None:
    """What the adapter's adaptive gates learned; None without any."""
    found = {}
    for name, layer in adapter.layers.items():
        for term in layer.terms:
            if isinstance(term.config, FouRAConfig) and term.config.gate == "adaptive":
                found[name] = tuple(term.params["gate.mean_open"].tolist())
    if not found:
        return None
    dead, always = counted.extremes() if counted is not None else ((), ())
    return GateReport(found, dead, always)


def joined(one: GateReport | None, other: GateReport | None) -> GateReport | None:
    """The report of two attachments together."""
    if one is None or other is None:
        return one or other
    return GateReport(
        {**one.mean_open, **other.mean_open},
        tuple(dict.fromkeys((*one.dead, *other.dead))),
        tuple(dict.fromkeys((*one.always_open, *other.always_open))),
    )
