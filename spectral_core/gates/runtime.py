"""The adaptive gates of one attached adapter at run time: mode, temperature, and what they did.

The gate itself is pure functions (:mod:`.formula`); everything that changes from call to call is in one
object here: the annealing of training, the mean level μ while it is being learned, the mean opening E[p] from
which a gate can be frozen, the rank target's penalty, and the recorder.

Shapes: φ, which gates are open, and p are (B, rank); E[p] is (rank,), μ a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpectralAdapterError
from ..maths.grouping import alike
from ..words import chosen
from .record import GateRecorder

Mode = Literal["soft", "straight_through", "hard"]
MODES: tuple[Mode, ...] = get_args(Mode)
ANNEALED_FRACTION = 0.7  # of the training steps; τ falls from 1 to FINAL_TEMPERATURE over them
FINAL_TEMPERATURE = 0.5  # not lower: at τ = 0.1 the gradient at logit 2 is 2e-8
SETTLE_STEPS = 100  # training steps whose mean becomes μ
_COUNT_EVERY = 8192  # gates seen, where nobody closes a step


def temperature_at(fraction: float) -> float:
    """τ at a fraction (0 … 1) of the training steps: 1 → 0.5 linearly over the first 70 %, then 0.5."""
    return 1.0 - (1.0 - FINAL_TEMPERATURE) * min(max(fraction, 0.0) / ANNEALED_FRACTION, 1.0)


def mode_at(fraction: float) -> str:
    """``soft`` over the first 70 % of the training steps, then ``straight_through``."""
    return "soft" if fraction < ANNEALED_FRACTION else "straight_through"


@dataclass
class _Mean:
    """A running mean of tensors on their own device, without waiting for it."""

    total: Tensor
    count: int
    known: Tensor | None = None  # the value, where it was worked out with those of other layers; final then

    @property
    def value(self) -> Tensor:
        return self.total / self.count if self.known is None else self.known


def _add(means: dict[str, _Mean], name: str, total: Tensor, count: int) -> None:
    if name in means:
        means[name].total = means[name].total + total
        means[name].count += count
    else:
        means[name] = _Mean(total, count)


@dataclass
class GateRuntime:
    """How the gates of one attached adapter behave now, and what they did. One per attachment.

    mode: ``soft`` (values p), ``straight_through`` (0/1 forward, p's gradient), ``hard`` (0/1, inference).
    progress: noise level, 0 the noisiest … 1 the cleanest, a number or one per batch row; only recorded.
    target_open, penalty_weight: ρ and λ of ``penalty()``; none without both.
    settle_steps: training steps over which μ is learned; 0 keeps the stored one (an adapter trained before).
    counting: off while gradient checkpointing runs a forward pass again, whose gates were counted before.
    logits: kept here, flat, of every pass that counts, where it is a list; +inf of a gate that is open only
    because it is its layer's largest.

    A trainer calls ``anneal(fraction)`` before each step, adds ``penalty()`` to its loss, calls
    ``end_step()`` after it, and near the end ``start_calibration()``; ``buffers()`` then holds what belongs
    into the adapter.
    """

    mode: str = "hard"
    temperature: float = FINAL_TEMPERATURE
    progress: float | Tensor | None = None
    recorder: GateRecorder | None = None
    target_open: float | None = None
    penalty_weight: float = 0.0
    settle_steps: int = SETTLE_STEPS
    counting: bool = True
    logits: list[Tensor] | None = field(default=None, repr=False)
    _penalties: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _levels: dict[str, _Mean] = field(default_factory=dict, repr=False)
    _mu: dict[str, _Mean] = field(default_factory=dict, repr=False)
    _open: dict[str, _Mean] = field(default_factory=dict, repr=False)
    _calibrating: bool = field(default=False, repr=False)
    _seen: list[tuple[str, Tensor | None, Tensor | None]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.set_mode(self.mode, self.temperature)

    def set_mode(self, mode: str, temperature: float) -> None:
        """Choose soft / straight_through / hard and τ > 0 (which a hard gate does not depend on)."""
        chosen(mode, MODES, "gate mode")
        if not temperature > 0:
            raise SpectralAdapterError(f"gate temperature {temperature!r}: expected a number above 0")
        self.mode, self.temperature = mode, temperature

    def anneal(self, fraction: float) -> None:
        """Mode and temperature of the training schedule at a fraction (0 … 1) of the steps."""
        self.set_mode(mode_at(fraction), temperature_at(fraction))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Hard gates inside the block (samples during training, evaluation), as before afterwards."""
        before = self.mode, self.temperature
        try:
            self.mode = "hard"
            yield
        finally:
            self.mode, self.temperature = before

    def end_step(self) -> None:
        """Close a training step: what its forward passes saw enters μ, until μ is settled."""
        self._count()
        alike: dict[Any, list[str]] = {}
        for name, seen in self._levels.items():
            steps = self._mu[name].count if name in self._mu else 0
            alike.setdefault((steps, seen.count, seen.total.device), []).append(name)
        for (steps, count, _), names in alike.items():  # those of all layers in few operations
            totals = torch.stack([self._levels[name].total for name in names]) / count
            if steps:
                totals = torch.stack([self._mu[name].total for name in names]) + totals
            values = totals / (steps + 1)
            for name, total, value in zip(names, totals.unbind(), values.unbind(), strict=True):
                self._mu[name] = _Mean(total, steps + 1, value)
        self._levels.clear()
        self._penalties.clear()

    def mu(self, name: str, stored: Tensor) -> Tensor:
        """μ of a layer: the mean so far while it is being learned, else the stored one."""
        return self._mu[name].value if name in self._mu else stored

    def penalty(self) -> Tensor | float:
        """λ · mean over layers of max(0, mean(p) − ρ)², last forward pass; 0.0 without a target.

        One-sided and squared on purpose: a plain λ·mean(p) kills whole layers under gradient noise.
        """
        if not self._penalties:
            return 0.0
        return self.penalty_weight * torch.stack(list(self._penalties.values())).mean()

    def start_calibration(self) -> None:
        """Count E[p] afresh from here on, in any mode."""
        self._count()
        self._open.clear()
        self._calibrating = True

    def mean_open(self, name: str) -> Tensor | None:
        """E[p] (rank,) of a layer since ``start_calibration()``; None if it has not run since."""
        self._count()
        return self._open[name].value if name in self._open else None

    def buffers(self) -> dict[str, dict[str, Tensor]]:
        """Layer → the buffers learned so far (``gate.mu``, ``gate.mean_open``), for the adapter."""
        self._count()
        learned: dict[str, dict[str, Tensor]] = {}
        for buffer, means in (("gate.mu", self._mu), ("gate.mean_open", self._open)):
            for name, mean in means.items():
                learned.setdefault(name, {})[buffer] = mean.value
        return learned

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on, for :meth:`restore`; it stays as it is while training goes
        on."""
        self._count()
        means = {"mu": self._mu, "open": self._open, "levels": self._levels}
        kept = {kind: {n: (m.total, m.count) for n, m in found.items()} for kind, found in means.items()}
        return {"mode": self.mode, "temperature": self.temperature, "calibrating": self._calibrating} | kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to a :meth:`state`, bit for bit."""
        self.set_mode(state["mode"], state["temperature"])
        self._calibrating = bool(state["calibrating"])
        self._mu, self._open, self._levels = (
            {name: _Mean(total, count) for name, (total, count) in state[kind].items()}
            for kind in ("mu", "open", "levels")
        )
        self._penalties.clear()
        self._seen.clear()

    def average(self, mean: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Several processes that train on parts of one batch: what each saw becomes the mean over them."""
        self._count()
        seen = [*self._levels.values(), *self._open.values()]
        for one, total in zip(seen, mean([one.total for one in seen]), strict=True):
            one.total = total

    def watch(self, name: str, phi: Tensor, raw: Tensor, is_open: Tensor, p: Tensor | None) -> None:
        """See one layer's gates (B, rank) in a forward pass: logits, which are open, and p where the runtime
        ``wants_p``.

        ``end_step`` takes mean(φ) into μ. What is averaged is only kept here: a model has hundreds of gates,
        and those of all layers are counted in few operations later.
        """
        if p is not None and self.penalised and p.requires_grad:
            assert self.target_open is not None
            self._penalties[name] = F.relu(p.mean() - self.target_open).square()
        if not self.counting:
            return
        learns = self._learns_level(name)
        opened = p.detach() if self._calibrating and p is not None else None
        if learns or opened is not None:
            self._seen.append((name, phi.detach() if learns else None, opened))
            if len(self._seen) >= _COUNT_EVERY:
                self._count()
        if self.logits is not None:
            found = raw.detach()
            self.logits.append(torch.where(is_open & (found <= 0), torch.inf, found).flatten())
        if self.recorder is not None:
            self.recorder.record(name, is_open, self.progress)

    def _learns_level(self, name: str) -> bool:
        settled = name in self._mu and self._mu[name].count >= self.settle_steps
        return self.mode != "hard" and self.settle_steps > 0 and not settled

    def _count(self) -> None:
        """Add what was seen to the means."""
        for means, place in ((self._levels, 1), (self._open, 2)):
            values = [(seen[0], seen[place]) for seen in self._seen]
            kept = [(name, value) for name, value in values if isinstance(value, Tensor)]
            for group in alike(kept, lambda each: (each[1].shape, each[1].device)):
                together = torch.stack([value for _, value in group])
                totals = (together.mean(2) if means is self._levels else together).sum(1)
                for (name, _), total in zip(group, totals.unbind(), strict=True):
                    _add(means, name, total, together.shape[1])
        self._seen.clear()

    @property
    def penalised(self) -> bool:
        """Whether p's gradient is wanted for the penalty."""
        return self.target_open is not None and self.penalty_weight > 0

    @property
    def wants_p(self) -> bool:
        """Whether p is wanted besides the gate's values."""
        return self._calibrating or self.penalised
