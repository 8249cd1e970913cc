"""How far a run has come: what its checkpoints hold beside the stepper's state, and which run may go on from
one.

Shapes: losses (steps done,).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import SpectralAdapterError
from ..config.config import TrainConfig
from ..objectives.losses import Setup
from ..runs.checkpoint import State
from ..runs.events import Clock, Smoothed
from ..runs.place import differences
from .divergence import Watch
from .validation import Validation


@dataclass
class Progress:
    """losses: of every step done, in the list of the run's result."""

    watch: Watch
    losses: list[float]
    smoothed: Smoothed = field(default_factory=Smoothed)
    clock: Clock = field(default_factory=Clock)
    validation: Validation = field(default_factory=Validation)

    def put_into(self, found: State, holds_out: bool) -> None:
        """Add it to a checkpoint. holds_out: the run has held-out pictures."""
        found.tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        found.values |= {
            "seconds": self.clock.seconds,
            "smoothed": [self.smoothed.total, self.smoothed.weight],
            "watch": self.watch.state(),
        }
        if holds_out:
            found.put("validation", self.validation.state())

    def restore(self, found: State, holds_out: bool) -> None:
        """As it was when the checkpoint was written."""
        self.losses[:] = found.tensors["losses"].tolist()
        self.clock = Clock(before=float(found.values["seconds"]))
        self.smoothed = Smoothed(self.smoothed.beta, *found.values["smoothed"])
        self.watch.restore(found.values["watch"])
        if holds_out:
            self.validation.restore(found.part("validation"))


def identity(
    setup: Setup, config: TrainConfig, method: str, named: Sequence[tuple[str, nn.Parameter]], processes: int
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it; the steps may differ."""
    settings = {k: v for k, v in config.as_dict().items() if k not in ("steps", "processes")}
    shapes = repr([(name, tuple(p.shape)) for name, p in named])
    return {
        "method": method,
        "config": settings,
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "examples": len(setup.latents),
        "processes": processes,
        **({"held_out": list(setup.held_out)} if setup.held_out else {}),
    }


def steps_done(found: State, own: Mapping[str, Any], wanted: int, folder: Path | None) -> int:
    """Of a checkpoint that this run may go on from. own: the run's :func:`identity`; wanted: its steps.

    Raises SpectralAdapterError for another run's checkpoint, and for one that is further than wanted.
    """
    if unlike := differences(found.values["identity"], own):
        raise SpectralAdapterError(
            f"run folder {folder}: holds a run with other settings ({'; '.join(unlike[:4])}): use those, or "
            "another folder"
        )
    done = int(found.values["step"])
    if done > wanted:
        raise SpectralAdapterError(
            f"steps {wanted}: the run in {folder} has made {done} already; ask for more, or use another "
            "folder"
        )
    return done


def new_schedule(done: int, planned: int, wanted: int) -> str:
    """What going on to other steps than were planned means, for the user."""
    return (
        f"the run {'was finished' if done == planned else 'stood'} at step {done} of {planned}; going on to "
        f"{wanted} is a new schedule: warm-up, learning rate and gate temperature start afresh at step "
        f"{done}, so the result is not that of {wanted} steps in one go"
    )
