"""The adaptive gates in training: annealing, calibration over the last tenth, and what became of them.

Shapes: E[p] (rank,) per layer; open gates are counts 0 … rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...adapter.adapter import Adapter
from ...attach.attaching import Attachment
from ...gates.record import GateRecorder
from ...gates.runtime import ANNEALED_FRACTION
from ...maths.grouping import alike
from ...methods import method_of
from ..config.config import TrainConfig
from ..runs.outcome import GateReport

TOLD_EVERY = 10  # steps between events that name the open gates of every layer, which are long
LEVELS = 10  # parts of the noise level
SMOOTHED = 20.0  # the share of open gates is smoothed over the run's steps by this
CALIBRATED = 0.1  # of the steps: E[p], from which gates can be frozen without data, is counted over them


class OpenGates(GateRecorder):
    """Open gates per layer of one step, and over the calibration; kept on the gates' device until asked."""

    def __init__(self) -> None:
        super().__init__(bins=1)
        self._step: dict[str, list[Tensor]] = {}
        self._at: dict[str, list[Tensor | None]] = {}  # the noise levels of these passes
        self._levels: dict[int, tuple[float, float]] = {}  # bin -> (Σ share · gates, Σ gates)
        self.ranks: dict[str, int] = {}
        self.calibration: dict[str, tuple[float, int, int]] = {}  # layer -> (Σ open gates, steps, rank)

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        self.ranks[layer] = is_open.shape[1]
        self._step.setdefault(layer, []).append(is_open)
        is_known = isinstance(progress, Tensor) and progress.shape == is_open.shape[:1]
        self._at.setdefault(layer, []).append(progress if is_known else None)  # type: ignore[arg-type]

    def step(self, by_level: bool = False) -> dict[str, float]:
        """Layer -> mean open gates of the step just done; one transfer for all layers of a shape.

        by_level: the step counts for :meth:`take_levels`.
        """
        counted: dict[str, float] = {}

        def kind(layer: str) -> Hashable:
            seen = zip(self._step[layer], self._at[layer], strict=True)
            return tuple((x.shape, x.device, progress is None) for x, progress in seen)

        for layers in alike(self._step, kind):
            passes = [torch.stack(seen) for seen in zip(*(self._step[n] for n in layers), strict=True)]
            means = torch.stack([seen.sum(2).float().mean(1) for seen in passes]).mean(0)
            at = [progress for progress in self._at[layers[0]] if progress is not None]
            shares = (
                [seen.float().mean((0, 2)) for seen in passes] if by_level and len(at) == len(passes) else []
            )
            told = torch.cat([means, *shares, *(p.float().to(means.device) for p in at if shares)]).tolist()
            counted.update(zip(layers, told[: len(layers)], strict=True))
            if shares:
                self._count_levels(told[len(layers) :], len(layers) * self.ranks[layers[0]])
        found = {layer: counted[layer] for layer in self._step}
        self._step.clear()
        self._at.clear()
        return found

    def _count_levels(self, told: list[float], gates: int) -> None:
        """Shares of open gates of some rows, and behind them the rows' progress."""
        rows = len(told) // 2
        for share, progress in zip(told[:rows], told[rows:], strict=True):
            place = min(LEVELS - 1, max(0, int(progress * LEVELS)))
            total, weight = self._levels.get(place, (0.0, 0.0))
            self._levels[place] = (total + share * gates, weight + gates)

    def take_levels(self) -> list[float | None]:
        """The share of open gates in each of LEVELS equal parts of the noise, the noisiest first, over the
        steps since it was asked last; None where there were none."""
        found = [self._levels.get(place) for place in range(LEVELS)]
        self._levels.clear()
        return [None if seen is None else seen[0] / seen[1] for seen in found]

    def share(self, step: Mapping[str, float]) -> float:
        """Open gates of a step over all gates."""
        return sum(step.values()) / sum(self.ranks[layer] for layer in step)

    def calibrate(self, step: Mapping[str, float]) -> None:
        """Add a step to the calibration."""
        for layer, mean in step.items():
            total, count, _ = self.calibration.get(layer, (0.0, 0, 0))
            self.calibration[layer] = (total + mean, count + 1, self.ranks[layer])

    def calibrated_share(self) -> float | None:
        """Open gates over all gates since the calibration began."""
        means = [(total / count, rank) for total, count, rank in self.calibration.values()]
        return sum(mean for mean, _ in means) / sum(rank for _, rank in means) if means else None

    def effective_rank(self) -> float | None:
        """Open gates of a layer, the mean of all layers, since the calibration began."""
        means = [total / count for total, count, _ in self.calibration.values()]
        return sum(means) / len(means) if means else None

    def always_open(self) -> tuple[str, ...]:
        """Layers of which no gate closed since the calibration began."""
        return tuple(n for n, (total, count, rank) in self.calibration.items() if total == count * rank)


def set_gates(
    attachments: Sequence[Attachment], fraction: float, target: float, penalty: float, begins: bool
) -> None:
    """Before a step: τ and mode at this fraction of the schedule; the share that shall be open, 0 for none,
    and the penalty's weight while the gates are soft. begins: E[p] counts afresh from this step on."""
    for attachment in attachments:
        attachment.gates.anneal(fraction)
        attachment.gates.target_open = target or None
        attachment.gates.penalty_weight = penalty if attachment.gates.mode == "soft" else 0.0
        attachment.gates.logits = [] if target else None
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


@dataclass(frozen=True)
class Plan:
    """Steps (from 0) with which the gates begin to be hard, to be calibrated, and to be frozen."""

    hard_from: int
    calibrated_from: int
    frozen_from: int


def plan(config: TrainConfig, start: int) -> Plan:
    """The gates' part of a schedule that began at ``start``; nothing is frozen unless the settings say so."""
    length = config.steps - start
    frozen = start + math.ceil((1 - config.frozen_share) * length) if config.freeze_gates else config.steps
    calibrated = max(start, frozen - math.ceil(CALIBRATED * length))
    return Plan(start + math.ceil(ANNEALED_FRACTION * length), calibrated, frozen)


def gate_report(adapter: Adapter, counted: OpenGates | None = None) -> GateReport | None:
    """What the adapter's adaptive gates learned; None without any."""
    found, frozen = {}, {}
    for name, layer in adapter.layers.items():
        for term in layer.terms:
            if not term.mergeable:
                found[name] = tuple(term.params["gate.mean_open"].tolist())
                frozen[name] = int(
                    method_of(term.config).freeze(term.config, term.params)[1]["gate.mask"].sum()
                )
    if not found:
        return None
    return GateReport(found, frozen, counted.always_open() if counted is not None else ())


def joined(one: GateReport | None, other: GateReport | None) -> GateReport | None:
    """The report of two attachments together."""
    if one is None or other is None:
        return one or other
    return replace(
        one,
        mean_open={**one.mean_open, **other.mean_open},
        frozen_rank={**one.frozen_rank, **other.frozen_rank},
        always_open=tuple(dict.fromkeys((*one.always_open, *other.always_open))),
    )
