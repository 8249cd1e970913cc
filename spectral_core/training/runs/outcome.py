"""What a training run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...words import OneLine


@dataclass(frozen=True, repr=False)
class GateReport(OneLine):
    """What the gates learned: E[p] and open rows of a frozen gate by layer; dead and always open layers.

    ``dead`` and ``always_open`` are reported, not assumed wrong: at the rank that a layer needs, its gates
    may rightly stay open.
    """

    mean_open: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    dead: tuple[str, ...] = ()
    always_open: tuple[str, ...] = ()

    def frozen_rank(self, layer: str) -> int:
        """Open rows once the layer is frozen: E[p] > ½."""
        return sum(p > 0.5 for p in self.mean_open[layer])

    def warnings(self) -> list[str]:
        lines = []
        if self.dead:
            lines.append(
                f"{len(self.dead)} of {len(self.mean_open)} layers have no open gate and do nothing, first "
                f"{self.dead[0]}: lower gate_penalty or raise target_open if they should"
            )
        if self.always_open:
            lines.append(
                f"{len(self.always_open)} of {len(self.mean_open)} layers keep every gate open, first "
                f"{self.always_open[0]}: they need their whole rank, or more steps or a target_open to choose"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For events: per layer its rank, the mean of E[p] and the rank once frozen."""
        layers = {
            name: {"rank": len(p), "mean_open": sum(p) / len(p), "frozen_rank": self.frozen_rank(name)}
            for name, p in self.mean_open.items()
        }
        return {"layers": layers, "dead": list(self.dead), "always_open": list(self.always_open)}


@dataclass(repr=False)
class TrainResult(OneLine):
    """losses per step (those before a resume included), seconds, and whether the run was stopped before its
    last step. notes: what the user should know; gates: what they learned; checkpoint: the last one written;
    resumed_at: the step it went on from."""

    losses: list[float] = field(default_factory=list)
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
