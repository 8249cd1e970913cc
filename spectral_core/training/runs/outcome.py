"""What a training run came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...words import OneLine

MISSED = 0.05  # share of gates beside the target that is worth a warning


@dataclass(frozen=True, repr=False)
class GateReport(OneLine):
    """What the gates learned, by layer: E[p], and the open rows once frozen; the layers whose gates never
    close, which is reported and not assumed wrong: at the rank that it needs, a layer may rightly stay open.

    target, share: of open gates, wanted (0: none) and over the last steps with gates that decide;
    effective_rank: open gates of a layer there, the mean of all layers. loss, loss_frozen,
    loss_ungated: over the same pictures and noise, with gates that decide, with the frozen mask, and of an
    adapter of this effective rank trained without gates, where that was asked for.
    """

    mean_open: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    frozen_rank: Mapping[str, int] = field(default_factory=dict)
    always_open: tuple[str, ...] = ()
    target: float = 0.0
    share: float | None = None
    effective_rank: float | None = None
    loss: float | None = None
    loss_frozen: float | None = None
    loss_ungated: float | None = None

    def lines(self) -> list[str]:
        """What the gates came to, for the report."""
        if self.share is None:
            return []
        line = f"gates: {self.share:.0%} open"
        line += f" (target {self.target:.0%})" if self.target else ""
        if self.effective_rank is not None:
            line += f", effective rank {self.effective_rank:.1f}"
        if self.loss is not None and self.loss_frozen is not None:
            change = self.loss_frozen / self.loss - 1 if self.loss else 0.0
            line += (
                f"; loss on training pictures {self.loss:.4f} with gates that decide, {self.loss_frozen:.4f} "
                f"frozen ({change:+.1%})"
            )
            line += (
                f", {self.loss_ungated:.4f} trained without gates at that rank"
                if self.loss_ungated is not None
                else " (compare_ungated: without gates at that rank, too)"
            )
        return [line]

    def record(self) -> dict[str, float]:
        """For the adapter's file."""
        values = {
            "gates_open": self.share,
            "gates_effective_rank": self.effective_rank,
            "gates_loss": self.loss,
            "gates_loss_frozen": self.loss_frozen,
            "gates_loss_ungated": self.loss_ungated,
        }
        return {name: round(value, 6) for name, value in values.items() if value is not None}

    def warnings(self) -> list[str]:
        lines = []
        if self.target and self.share is not None and abs(self.share - self.target) > MISSED:
            lines.append(
                f"{self.share:.0%} of the gates are open, the target is {self.target:.0%}: train for more "
                "steps, or raise gate_learning_rate"
            )
        if self.always_open:
            advice = "raise gate_learning_rate" if self.target else "give a target_open"
            lines.append(
                f"{len(self.always_open)} of {len(self.mean_open)} layers keep every gate open, first "
                f"{self.always_open[0]}: they need their whole rank; if not, train for more steps or {advice}"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For events: per layer its rank, the mean of E[p] and the rank once frozen."""
        layers = {
            name: {"rank": len(p), "mean_open": sum(p) / len(p), "frozen_rank": self.frozen_rank[name]}
            for name, p in self.mean_open.items()
        }
        found = {"layers": layers, "always_open": list(self.always_open)}
        return found | {"target": self.target} | self.record()


@dataclass(frozen=True)
class Best:
    """The state with the lowest loss on held-out pictures. ``applied``: inside its block the attachments and
    words hold it, afterwards what they held before."""

    step: int
    loss: float
    applied: Callable[[], AbstractContextManager[None]]


@dataclass(repr=False)
class TrainResult(OneLine):
    """losses per step (those before a resume included), seconds, and whether the run was stopped before its
    last step. notes: what the user should know; gates: what they learned; checkpoint: the last one written;
    resumed_at: the step it went on from. held_out: step -> loss on the held-out pictures; best: the state
    where that is lowest, None where that is the state that the parameters are in."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best: Best | None = None
    seconds: float = 0.0
    stopped: bool = False
    notes: list[str] = field(default_factory=list)
    gates: GateReport | None = None
    checkpoint: Path | None = None
    resumed_at: int = 0

    def __str__(self) -> str:
        how = "stopped after" if self.stopped else "trained"
        done = f"{how} {len(self.losses)} steps, {self.seconds:.0f} s"
        loss = [f"last loss {self.losses[-1]:.4g}"] if self.losses else []
        return "\n".join(["; ".join([done, *loss]), *self.notes])
