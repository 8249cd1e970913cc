"""What a training run is told: frozen settings, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SpectralAdapterError

SCHEDULES = ("constant", "cosine", "linear")

DEFAULT_LEARNING_RATES = {"foura": 1e-4, "lora": 1e-4, "spectral_a": 1e-3, "spectral_r": 1e-2}
"""Starting points for models of Stable Diffusion's size; 0 in TrainConfig.learning_rate chooses from here."""


@dataclass(frozen=True)
class TrainConfig:
    """steps and batch_size count optimiser steps and pictures; learning_rate 0 is the method's default.

    token_learning_rate: of new word embeddings; 0 is ten times the adapter's. caption_dropout: share of
    pictures that train with an empty caption. target_open: wanted share of open gates (None: no penalty),
    gate_penalty its weight.
    """

    steps: int = 500
    batch_size: int = 1
    learning_rate: float = 0.0
    token_learning_rate: float = 0.0
    weight_decay: float = 0.01
    warmup: int = 10
    schedule: str = "constant"
    gradient_clip: float = 1.0
    caption_dropout: float = 0.1
    target_open: float | None = None
    gate_penalty: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least("steps", 1)
        self._at_least("batch_size", 1)
        self._at_least("warmup", 0)
        for name in ("learning_rate", "token_learning_rate", "weight_decay", "gradient_clip", "gate_penalty"):
            self._at_least(name, 0.0)
        if not 0 <= self.caption_dropout < 1:
            raise SpectralAdapterError(f"caption_dropout {self.caption_dropout}: expected 0 ≤ share < 1")
        if self.target_open is not None and not 0 < self.target_open <= 1:
            raise SpectralAdapterError(f"target_open {self.target_open}: expected 0 < share ≤ 1, or nothing")
        if self.schedule not in SCHEDULES:
            raise SpectralAdapterError(f"schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")

    def _at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or value < least:
            raise SpectralAdapterError(f"{name} {value}: expected a number of at least {least}")

    def rate_for(self, method: str) -> float:
        """The adapter's peak learning rate."""
        return self.learning_rate or DEFAULT_LEARNING_RATES[method]

    def rate_factor(self, step: int) -> float:
        """Multiplier of the peak rate at a step (from 0): linear warm-up, then the schedule."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        through = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 1.0 - through if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * through))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
