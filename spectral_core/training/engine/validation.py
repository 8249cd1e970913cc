"""The loss on held-out pictures over a run: which state is the best so far, and when to stop waiting for a
better one.

Shapes: those of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...attach.attaching import Attachment
from ..runs import state
from ..runs.checkpoint import State


@dataclass
class Validation:
    """What the checks came to. since: checks after the best; kept: the parameters to use and the gates at
    the best."""

    losses: dict[int, float] = field(default_factory=dict)
    best: float = math.inf
    best_step: int = 0
    since: int = 0
    kept: State | None = None

    def add(self, step: int, loss: float, counts: bool = True) -> bool:
        """Take a check in; whether it is the best so far. counts: off, it is told and no more."""
        self.losses[step] = loss
        if not counts:
            return False
        is_best = loss < self.best
        if is_best:
            self.best, self.best_step, self.since = loss, step, 0
        else:
            self.since += 1
        return is_best

    def exhausted(self, patience: int) -> bool:
        """Whether so many checks brought nothing better."""
        return 0 < patience <= self.since

    def state(self) -> State:
        """For a checkpoint."""
        found = State(
            {"losses": torch.tensor(list(self.losses.values()), dtype=torch.float64)},
            {"steps": list(self.losses), "best_step": self.best_step, "since": self.since},
        )
        if self.kept is not None:
            found.put("kept", self.kept)
        return found

    def restore(self, found: State) -> None:
        """Take over a :meth:`state`."""
        values = found.values
        self.losses = dict(zip(values["steps"], found.tensors["losses"].tolist(), strict=True))
        self.best_step, self.since = int(values["best_step"]), int(values["since"])
        self.best = self.losses.get(self.best_step, math.inf)
        self.kept = found.part("kept") if "kept" in values else None


def snapshot(named: Sequence[tuple[str, nn.Parameter]], attachments: Sequence[Attachment]) -> State:
    """Copies of the parameters as they are, and what the gates have learned."""
    found = State()
    found.put("parameters", state.pack_parameters(named, [p.detach().clone() for _, p in named]))
    found.put("gates", state.pack_gates(attachments))
    return found


@contextmanager
def applied(
    kept: State, named: Sequence[tuple[str, nn.Parameter]], attachments: Sequence[Attachment]
) -> Iterator[None]:
    """A :func:`snapshot` in place inside the block; afterwards what was there before, to the bit."""
    before = [p.detach().clone() for _, p in named]
    gates: list[dict[str, Any]] = [a.gates.state() for a in attachments]
    try:
        put_back(kept, named, attachments)
        yield
    finally:
        _fill(named, before)
        for attachment, seen in zip(attachments, gates, strict=True):
            attachment.gates.restore(seen)


def put_back(
    kept: State, named: Sequence[tuple[str, nn.Parameter]], attachments: Sequence[Attachment]
) -> None:
    """A :func:`snapshot` in place, for good."""
    _fill(named, state.unpack_parameters(named, kept.part("parameters")))
    state.unpack_gates(attachments, kept.part("gates"))


@torch.no_grad()
def _fill(named: Sequence[tuple[str, nn.Parameter]], values: Sequence[Tensor]) -> None:
    for (_, parameter), value in zip(named, values, strict=True):
        parameter.copy_(value)
